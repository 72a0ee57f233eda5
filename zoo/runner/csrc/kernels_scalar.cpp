// Plain C++: the kernels of any processor, and the ones to read first.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace zoo {
namespace scalar {

struct V {
    using F = float;
    static constexpr int N = 1;
    static F zero() { return 0; }
    static F set(float x) { return x; }
    static F load(const float *x) { return *x; }
    static F load(const uint16_t *x) { return half_to_float(*x); }
    static F load(const int8_t *x) { return *x; }
    template <class T>
    static float one(const T *x) { return load(x); }
    static void store(float *to, F x) { *to = x; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static F min(F a, F b) { return std::min(a, b); }
    static F max(F a, F b) { return std::max(a, b); }
    static F abs(F a) { return std::fabs(a); }
    static F round(F a) { return std::nearbyint(a); }
    static F scale2(F p, F n) { return std::ldexp(p, int(n)); }
    static float sum(F a) { return a; }
    static void sums(const F *a, float *to) { std::memcpy(to, a, 4 * sizeof(float)); }
    static float largest(F a) { return a; }
    static void to_half(const float *x, uint16_t *to, int n) {
        for (int i = 0; i < n; ++i) to[i] = float_to_half(x[i]);
    }
};

#include "ops.inl"

// The weights of pair p for all 16 rows: dense [32][16], zeros where nothing is stored.
static void expand(const Matrix &m, int row_block, int p, const uint8_t *&stream, int8_t (&w)[PAIR][ROWS]) {
    std::memset(w, 0, sizeof w);
    const int offset = m.offset();
    if (m.kind == Kind::dense) {
        const uint8_t *v = m.values + (size_t(row_block) * m.pairs + p) * 64 * m.bits;
        for (int quad = 0; quad < QUADS; ++quad)
            for (int row = 0; row < ROWS; ++row)
                for (int i = 0; i < LANE; ++i) {
                    w[quad * LANE + i][row] = int8_t(m.dense_integer(v + row * LANE + i, quad));
                }
        return;
    }
    if (m.kind == Kind::mask) {
        int nibble = 0;
        for (int quad = 0; quad < QUADS; ++quad) {
            const uint64_t mask = m.mask[(size_t(row_block) * m.pairs + p) * QUADS + quad];
            for (int bit = 0; bit < 64; ++bit) {
                if (!(mask >> bit & 1)) continue;
                int value;
                if (m.bits == 8) value = int8_t(*stream++);
                else {
                    value = (*stream >> nibble * 4 & 15) - offset;
                    stream += nibble;
                    nibble ^= 1;
                }
                w[quad * LANE + bit % LANE][bit / LANE] = int8_t(value);
            }
        }
        stream += nibble;  // every pair begins with a whole byte
        return;
    }
    const int quads = m.keep / 2, chunk = p / m.pairs_per_chunk, first = p % m.pairs_per_chunk * quads;
    const int chunk_quads = quads * m.pairs_per_chunk;
    const uint8_t *v = m.values + row_block * m.bytes_per_row_block() +
                       size_t(chunk) * (m.bytes_per_row_block() / (m.pairs / m.pairs_per_chunk));
    for (int s = 0; s < 2 * m.keep; ++s) {
        const int quad = first + s / LANE, block = s / m.keep;
        const int start = block * BLOCK + m.window_starts[s % m.keep];
        for (int row = 0; row < ROWS; ++row) {
            const int at = row * LANE + s % LANE;
            auto plane = [&](const uint8_t *base, int bits) {
                return base[quad * bits / 8 * 64 + at] >> (quad % (8 / bits) * bits) & ((1 << bits) - 1);
            };
            int value, column;
            if (m.kind == Kind::banded) {
                const uint8_t byte = v[quad * 64 + at];
                value = byte >> m.offset_bits;
                column = byte & ((1 << m.offset_bits) - 1);
            } else {
                column = plane(v, m.offset_bits);
                value = plane(v + chunk_quads * 64 * m.offset_bits / 8, m.bits);
            }
            int8_t &to = w[start + column][row];  // an empty slot adds a zero
            to = int8_t(to + value - offset);
        }
    }
}

static void multiply(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    std::memset(out, 0, size_t(end - begin) * x.tokens * ROWS * sizeof(float));
    for (int block = begin; block < end; ++block, out += x.tokens * ROWS) {
        const uint8_t *stream = m.kind == Kind::mask ? m.values + m.value_starts[block] : nullptr;
        for (int p = 0; p < m.pairs; ++p) {
            int8_t w[PAIR][ROWS];
            expand(m, block, p, stream, w);
            const size_t group = (size_t(block) * m.groups + std::min(p / m.pairs_per_group, m.groups - 1)) * ROWS;
            const size_t first = size_t(p) * x.capacity;
            for (size_t e = first; e < first + x.tokens + x.extras[p]; ++e) {
                const int8_t *a = x.integers.data() + e * PAIR;
                for (int row = 0; row < ROWS; ++row) {
                    int32_t dot = 0;
                    for (int c = 0; c < PAIR; ++c) dot += a[c] * w[c][row];
                    float y = dot * half_to_float(m.scales[group + row]);
                    if (m.minima) y += x.sum[e] * half_to_float(m.minima[group + row]);
                    out[x.token[e] * ROWS + row] += y * x.scale[e];
                }
            }
        }
    }
}

}  // namespace scalar

const Kernels scalar_kernels = {
    "scalar",         scalar::multiply, scalar::quantize, scalar::rms_norm, scalar::layer_norm, scalar::gate,
    scalar::silu, scalar::gelu,     scalar::rotate,   scalar::store,    scalar::attend,
};

}  // namespace zoo
