#include "memory.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

// The sanitizer watches what lies around a block of malloc, not around a mapping.
#if defined(_WIN32) || defined(__SANITIZE_ADDRESS__)
#define ZOO_PLAIN_MEMORY
#endif

namespace zoo {

#ifndef ZOO_PLAIN_MEMORY
constexpr size_t HUGE_PAGE = size_t(2) << 20;
#endif

Memory::Memory(size_t bytes, bool huge) : size_(bytes) {
    if (!bytes) return;
#ifdef ZOO_PLAIN_MEMORY
    (void)huge;
    data_ = static_cast<uint8_t *>(std::calloc(bytes, 1));
    if (!data_) throw std::bad_alloc();
#else
    if (huge) size_ = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    // Map a huge page more than needed and give back what lies before and after the aligned part.
    const size_t extra = huge ? HUGE_PAGE : 0;
    void *mapped = mmap(nullptr, size_ + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
        size_ = 0;
        throw std::bad_alloc();
    }
    uint8_t *begin = static_cast<uint8_t *>(mapped);
    data_ = begin;
    if (huge) {
        data_ = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(begin) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        if (data_ > begin) munmap(begin, data_ - begin);
        const size_t behind = begin + size_ + extra - (data_ + size_);
        if (behind) munmap(data_ + size_, behind);
#ifdef MADV_HUGEPAGE
        madvise(data_, size_, MADV_HUGEPAGE);
#endif
    }
#endif
}

Memory::~Memory() {
    if (!data_) return;
#ifdef ZOO_PLAIN_MEMORY
    std::free(data_);
#else
    munmap(data_, size_);
#endif
}

Memory::Memory(Memory &&other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
}

Memory &Memory::operator=(Memory &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

static void read_range(const std::string &path, const Range &range) {
#ifdef _WIN32
    std::unique_ptr<FILE, int (*)(FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file || _fseeki64(file.get(), range.offset, SEEK_SET) || std::fread(range.to, 1, range.size, file.get()) != range.size)
        throw std::runtime_error("cannot read " + path);
#else
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw std::runtime_error("cannot open " + path);
    uint64_t done = 0;
    while (done < range.size) {
        const ssize_t got = pread(file, range.to + done, std::min<uint64_t>(range.size - done, 1 << 24), range.offset + done);
        if (got <= 0) break;
        done += got;
    }
    close(file);
    if (done < range.size) throw std::runtime_error(path + " is shorter than its header says");
#endif
}

void read_ranges(const std::string &path, const std::vector<Range> &ranges, int threads) {
    constexpr uint64_t PIECE = uint64_t(16) << 20;
    std::vector<Range> pieces;
    for (const Range &range : ranges)
        for (uint64_t at = 0; at < range.size; at += PIECE)
            pieces.push_back({range.offset + at, std::min(PIECE, range.size - at), range.to + at});
    std::atomic<size_t> next{0};
    std::string failure;
    std::atomic<bool> failed{false};
    auto work = [&] {
        for (size_t i; (i = next++) < pieces.size() && !failed;) {
            try {
                read_range(path, pieces[i]);
            } catch (const std::exception &error) {
                if (!failed.exchange(true)) failure = error.what();
            }
        }
    };
    std::vector<std::thread> workers;
    try {
        for (size_t i = 1; i < std::min(size_t(threads), pieces.size()); ++i) workers.emplace_back(work);
    } catch (const std::system_error &) {  // fewer threads read too
    }
    work();
    for (auto &worker : workers) worker.join();
    if (failed) throw std::runtime_error(failure);
}

static uint64_t sum_of(const uint64_t *begin, size_t count) {
    uint64_t sums[32] = {};
    for (size_t i = 0; i + 32 <= count; i += 32)
        for (int j = 0; j < 32; ++j) sums[j] += begin[i + j];
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    return sum;
}

double read_bandwidth(size_t bytes, int threads, int repeats) {
    Memory memory(bytes, true);
    std::memset(memory.data(), 1, bytes);
    const size_t each = bytes / threads / 64 * 64;
    std::atomic<uint64_t> total{0};
    double best = 0;
    for (int i = 0; i < repeats; ++i) {
        std::atomic<int> ready{0};
        std::vector<double> begun(threads), ended(threads);
        auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
        auto work = [&](int thread) {
            ++ready;
            while (ready < threads) std::this_thread::yield();
            begun[thread] = now();
            total += sum_of(reinterpret_cast<const uint64_t *>(memory.data() + thread * each), each / 8);
            ended[thread] = now();
        };
        std::vector<std::thread> workers;
        for (int t = 1; t < threads; ++t) workers.emplace_back(work, t);
        work(0);
        for (auto &worker : workers) worker.join();
        const double seconds = *std::max_element(ended.begin(), ended.end()) - *std::min_element(begun.begin(), begun.end());
        best = std::max(best, each * threads / seconds / 1e9);
    }
    return total ? best : 0;
}

}  // namespace zoo
