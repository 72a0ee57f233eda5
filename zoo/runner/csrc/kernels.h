// What every instruction set provides: one table of functions over the packed layouts of zoo/runner/format.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace zoo {

constexpr int BLOCK = 16;  // columns of which `keep` are kept
constexpr int PAIR = 32;   // columns of one step, with one scale of the activations
constexpr int ROWS = 16;   // rows interleaved in a vector of 64 bytes
constexpr int LANE = 4;    // weights of one row in it
constexpr int QUADS = PAIR / LANE;

enum class Kind { dense, banded, planes, mask };

// One packed matrix; the memory belongs to the model's arena, which is readable 64 bytes around it.
struct Matrix {
    Kind kind = Kind::dense;
    int rows = 0, columns = 0, bits = 0, keep = 0, offset_bits = 0;
    int row_blocks = 0, pairs = 0, groups = 0;
    int pairs_per_group = 0;
    int pairs_per_chunk = 1;                // planes: pairs whose parts fill whole vectors
    const uint8_t *values = nullptr;
    const uint16_t *scales = nullptr;       // float16 [row_blocks][groups][16]
    const uint16_t *minima = nullptr;       // or null
    const uint64_t *mask = nullptr;         // [row_blocks][pairs * 8]
    const float *bias = nullptr;            // [rows] or null
    std::vector<uint64_t> value_starts;     // mask: first value byte of each row block
    uint8_t window_starts[BLOCK] = {};

    size_t bytes_per_row_block() const {    // of the values, where they do not depend on a mask
        const size_t quads = size_t(pairs) * (kind == Kind::dense ? QUADS : keep / 2);
        const int bits_each = kind == Kind::dense ? bits : kind == Kind::banded ? 8 : bits + offset_bits;
        return quads * 64 * bits_each / 8;
    }
    int offset() const { return minima ? 0 : 1 << (bits - 1); }

    // A dense weight of quad `quad`, whose byte would be at `v` if the quad were the first.
    int dense_integer(const uint8_t *v, int quad) const {
        if (bits == 8) return int8_t(v[size_t(quad) * 64]);
        if (bits == 4) return (v[size_t(quad / 2) * 64] >> quad % 2 * 4 & 15) - offset();
        v += size_t(quad / 4) * 192;  // of four vectors of 6 bits the last lies in the two highest bits of the others
        if (quad % 4 < 3) return (v[quad % 4 * 64] & 63) - offset();
        return (v[0] >> 6 | v[64] >> 6 << 2 | v[128] >> 6 << 4) - offset();
    }
};

// Activations of `tokens` tokens as 8-bit integers, 32 columns to a scale. Where the largest of the 32
// stands out, what rounding left over follows as a second integer vector, so a value is the sum of
// its entries. Entry e of pair p is `first[p * capacity + e]` and so on; the first `tokens` entries are
// those of the tokens in order, then come `extras[p]` second vectors with their token in `token`.
struct Activations {
    int tokens = 0, pairs = 0;
    int capacity = 0;                       // entries a pair has room for: 2 * tokens
    std::vector<int8_t> integers;           // [pairs][capacity][32]
    std::vector<uint8_t> biased;            // the same plus 128
    std::vector<float> scale;               // [pairs][capacity]
    std::vector<int32_t> sum;               // [pairs][capacity] sum of the integers
    std::vector<int32_t> token;             // [pairs][capacity]
    std::vector<int32_t> extras;            // [pairs]
    std::vector<uint8_t> has_extra;         // [tokens][pairs], before `gather`

    void resize(int tokens_, int pairs_) {
        tokens = tokens_;
        pairs = pairs_;
        capacity = 2 * tokens;
        const size_t entries = size_t(pairs) * capacity;
        if (scale.size() < entries) {
            integers.resize(entries * PAIR);
            biased.resize(entries * PAIR);
            scale.resize(entries);
            sum.resize(entries);
            token.resize(entries);
        }
        if (extras.size() < size_t(pairs)) extras.resize(pairs);
        if (has_extra.size() < size_t(pairs) * tokens) has_extra.resize(size_t(pairs) * tokens);
    }
    // Second vectors were written at entry tokens + t: close the gaps. For pairs [begin, end).
    void gather(int begin, int end);
};

enum class Cache { f16, int8 };

constexpr int QUERIES = 8;  // attended to at once, at most

// Keys and values of one layer: [slot][kv head][position][head_dim], with a scale per position for int8.
struct KeyValues {
    Cache type = Cache::f16;
    int kv_heads = 0, head_dim = 0, context = 0;
    void *keys = nullptr, *values = nullptr;
    float *key_scales = nullptr, *value_scales = nullptr;

    size_t row(int slot, int head, int position) const {
        return (size_t(slot) * kv_heads + head) * context + position;
    }
};

// Attention of some consecutive tokens of one slot for one head.
struct Attention {
    const float *q;            // first token's query of this head
    float *out;
    size_t q_stride, out_stride;  // floats from one token to the next
    int tokens, slot, kv_head, position;  // position of the first token
    int window;                // positions a token sees, itself included; 0: all
    float scale, slope;        // of q . k; of ALiBi's bias slope * (key position - query position)
};

struct Kernels {
    const char *name;
    // Rows [16 * begin, 16 * end) of m times the activations: out [end - begin][tokens][16].
    void (*multiply)(const Matrix &m, const Activations &x, int begin, int end, float *out);
    // Quantize one token's `columns` values into entry t and, where needed, tokens + t of every pair.
    void (*quantize)(const float *x, int columns, int t, Activations &out);
    void (*rms_norm)(const float *x, const float *weight, const float *bias, int n, float eps, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, int n, float eps, float *out);
    void (*gate)(float *x, const float *up, int n);  // x = silu(x) * up
    void (*silu)(float *x, int n);
    void (*gelu)(float *x, int n);
    void (*rotate)(float *x, const float *cos, const float *sin, int half);
    void (*store)(const KeyValues &kv, size_t row, const float *k, const float *v);
    void (*attend)(const KeyValues &kv, const Attention &a, float *scores);
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels neon_kernels;

// The table for this processor, or the one named (avx512, avx2, neon, scalar); throws std::invalid_argument
// for a name that is unknown or that this processor cannot run.
const Kernels &kernels(const char *name);
const char *best_isa();

// A second vector of integers is kept where the largest of 32 values exceeds this many times the root mean
// square of all of the token's values. At 3.5, on SmolLM2, one in five has one, and the mean KL divergence
// from float activations is 0.0004 nats instead of 0.0033.
constexpr float OUTLIER = 3.5f;

// Streams of weights are asked for this far ahead, every line: a Zen 5 core then reads a third more, others as much.
// (Where a stream is asked for in part only, the hardware's own prefetcher gives up on it.)
constexpr int AHEAD = 4096;

inline void prefetch(const uint8_t *stream, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(stream + AHEAD + i);
}

}  // namespace zoo
