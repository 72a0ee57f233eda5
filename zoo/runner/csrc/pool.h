// Threads that stay: they run one function together, meet at barriers inside of it, and sleep between calls.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace zoo {

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int threads() const { return threads_; }
    // Call job(0) here and job(1 ... threads - 1) on the others; returns when all are done.
    void run(const std::function<void(int)> &job);
    // All threads wait here for one another; only inside of a job.
    void barrier();

  private:
    void worker(int index);
    int threads_;
    std::vector<std::thread> workers_;
    const std::function<void(int)> *job_ = nullptr;
    std::atomic<unsigned> call_{0};
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace zoo
