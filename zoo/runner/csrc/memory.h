// Large memory: huge pages where the system has them, files read into it by several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace zoo {

// Zeroed memory that is given back at the end. `huge` asks for huge pages: with 4 KB pages, translating
// addresses costs a stream of weights up to half of its bandwidth.
class Memory {
  public:
    Memory() = default;
    Memory(size_t bytes, bool huge);
    ~Memory();
    Memory(Memory &&other) noexcept;
    Memory &operator=(Memory &&other) noexcept;
    uint8_t *data() const { return data_; }
    size_t size() const { return size_; }

  private:
    uint8_t *data_ = nullptr;
    size_t size_ = 0;
};

struct Range {
    uint64_t offset, size;  // in the file
    uint8_t *to;
};

// Copy ranges of a file with `threads` threads. Throws std::runtime_error when the file cannot be read or is short.
void read_ranges(const std::string &path, const std::vector<Range> &ranges, int threads);

// GB/s at which `threads` threads read a buffer of `bytes`, best of `repeats`.
double read_bandwidth(size_t bytes, int threads, int repeats);

}  // namespace zoo
