#include "pool.h"

#include <chrono>
#include <stdexcept>

#ifndef _WIN32
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace zoo {

static inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin while the wait is short; let others have the processor when it is not.
constexpr int SPINS = 2000;
// Between two tokens the caller samples: long enough to stay awake for, and no longer.
constexpr auto AWAKE = std::chrono::microseconds(200);

static long this_process() {
#ifdef _WIN32
    return 0;
#else
    return getpid();
#endif
}

Pool::Pool(int threads) : threads_(threads), process_(this_process()) {
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { worker(i); });
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() {
    if (!forked()) {
        stop();
        return;
    }
    // The threads are in the other process: nobody will ever be joined, or leave the condition variable. Their
    // handles may even be those of this process's own threads by now, so both are left alone.
    new std::vector<std::thread>(std::move(workers_));
    wake_.release();
}

bool Pool::forked() const { return !workers_.empty() && process_ != this_process(); }

void Pool::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        ++call_;
    }
    wake_->notify_all();
    for (auto &worker : workers_) worker.join();
}

void Pool::run(const std::function<void(int)> &job) {
    if (forked()) throw std::runtime_error("its threads belong to the process that loaded it");
    {
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = &job;
        ++call_;
    }
    wake_->notify_all();
    job(0);
    barrier();
}

void Pool::barrier() {
    if (threads_ == 1) return;
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
        spins < SPINS ? pause() : std::this_thread::yield();
}

void Pool::worker(int index) {
    unsigned seen = 0;
    for (;;) {
        const auto until = std::chrono::steady_clock::now() + AWAKE;
        while (call_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) pause();
        if (call_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_->wait(lock, [&] { return call_ != seen; });
        }
        ++seen;
        if (stop_) return;
        (*job_)(index);
        barrier();
    }
}

}  // namespace zoo
