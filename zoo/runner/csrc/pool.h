// Threads that stay: they run one function together, meet at barriers inside of it, and sleep between calls.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace zoo {

class Pool {
  public:
    explicit Pool(int threads);  // throws std::system_error where the system has no more threads
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int threads() const { return threads_; }
    // Call job(0) here and job(1 ... threads - 1) on the others; returns when all are done. Throws
    // std::runtime_error in a process that was forked, which has none of the others.
    void run(const std::function<void(int)> &job);
    // All threads wait here for one another; only inside of a job.
    void barrier();

  private:
    void worker(int index);
    void stop();
    bool forked() const;
    int threads_;
    long process_;
    std::vector<std::thread> workers_;
    const std::function<void(int)> *job_ = nullptr;
    std::atomic<unsigned> call_{0};
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::unique_ptr<std::condition_variable> wake_ = std::make_unique<std::condition_variable>();
};

}  // namespace zoo
