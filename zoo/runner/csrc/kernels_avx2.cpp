// AVX2 with FMA and F16C: 8 rows x 4 bytes to a vector, products by vpmaddubsw.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits, where they have to fit. What is added up
// of those may wrap on the way: only the last sum has to fit. Packed weights are unsigned, the weight + 2^(bits - 1). One token
// multiplies them as they are and takes 2^(bits - 1) times the activations off. Many tokens decode weights once, with a sign:
// of these it is the gathered activations that are unsigned, as a + 128, and 128 * sum(w) is taken off.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace zoo {
namespace avx2 {

struct V {
    using F = __m256;
    static constexpr int N = 8;
    static F zero() { return _mm256_setzero_ps(); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static F load(const float *x) { return _mm256_loadu_ps(x); }
    static F load(const uint16_t *x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)); }
    static F load(const int8_t *x) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
    }
    static float one(const uint16_t *x) { return _cvtsh_ss(*x); }
    static float one(const int8_t *x) { return *x; }
    static void store(float *to, F x) { _mm256_storeu_ps(to, x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale2(F p, F n) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
    }
    static float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static void sums(const F *a, float *to) {  // of four vectors
        const F four = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    }
    static float largest(F a) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
    }
    static void to_half(const float *x, uint16_t *to, int n) {
        int i = 0;
        for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(load(x + i), 0));
        for (; i < n; ++i) to[i] = _cvtss_sh(x[i], 0);
    }
};

#include "ops.inl"

using I = __m256i;

static inline I load(const void *p) { return _mm256_loadu_si256((const I *)p); }
// v in a register: or the compiler reads memory anew for every use of v, and adds up in another order, for which there are
// not enough registers.
static inline I held(I v) {
    asm("" : "+x"(v));
    return v;
}
static inline I table(const uint8_t *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
static inline I nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static inline I shift_right(I v, int n) { return n ? _mm256_srli_epi16(v, n) : v; }
static inline I masked(I v, int shift, int mask) { return _mm256_and_si256(shift_right(v, shift), _mm256_set1_epi8(char(mask))); }
static inline I field(I v, int shift, int bits) { return masked(v, shift, (1 << bits) - 1); }
static inline I four(const int8_t *a) {
    int32_t value;
    std::memcpy(&value, a, 4);
    return _mm256_set1_epi32(value);
}
static inline I widen(I sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

// One byte per kept weight: the weight above, its offset below. `quad` gives both without a sign.
template <int KEEP, int OFFSET_BITS>
struct Banded {
    static constexpr int K = KEEP, OFF = OFFSET_BITS, WBITS = 8 - OFF;
    static constexpr int PAIRS = 1, BYTES = K / 2 * 64;
    const uint8_t *at = nullptr;

    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair() {}
    void next_chunk() { at += BYTES; }
    void quad(int, int j, int half, I &offset, I &w) const {
        const I v = held(load(at + j * 64 + half * 32));
        offset = field(v, 0, OFF);
        w = field(v, OFF, WBITS);
    }
};

// Offsets and weights in vectors of their own.
template <int KEEP, int WEIGHT_BITS>
struct Planes {
    static constexpr int K = KEEP, WBITS = WEIGHT_BITS, OFF = WBITS / 2, Q = K / 2;
    static constexpr int PER = 8 / OFF;  // quads of offsets in a vector
    static constexpr int PAIRS = Q % PER == 0 ? 1 : 2 * Q % PER == 0 ? 2 : 4;
    static constexpr int BYTES = PAIRS * Q * 8 * (WBITS + OFF);
    const uint8_t *at = nullptr;

    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair() {}
    void next_chunk() { at += BYTES; }
    void quad(int in_chunk, int j, int half, I &offset, I &w) const {
        const uint8_t *weights = at + PAIRS * Q * 8 * OFF;
        const int i = in_chunk * Q + j;
        offset = field(held(load(at + i / PER * 64 + half * 32)), i % PER * OFF, OFF);
        w = WBITS == 8 ? load(weights + i * 64 + half * 32)
                       : field(load(weights + i / 2 * 64 + half * 32), i % 2 * 4, 4);
    }
};

// Quads of a banded pair read their activations through a table of 16 of its 32 columns: the first block, the
// second, or for the quad that holds the end of one and the beginning of the other, the 16 in the middle,
// which windows of up to 8 columns never leave. A free choice needs both blocks there.
template <class Source>
struct Gathered : Source {
    static constexpr int K = Source::K, OFF = Source::OFF, WBITS = Source::WBITS, Q = K / 2;
    static constexpr bool WIDE = WBITS == 8;  // products fill 16 bits
    static constexpr int LARGEST = 1 << (WBITS - 1);
    // Quads whose sums fit: those of their products, two of each quad, in 16 bits, and those of the weights in 8.
    static constexpr int TOGETHER = WBITS == 6 && K > 8 ? 3 : Q;
    static_assert(WIDE || (TOGETHER * 2 * LARGEST * 127 <= 32767 && TOGETHER * LARGEST <= 128), "sums fit");
    static_assert(WIDE || 2 * LARGEST * 255 <= 32767, "two products of signed weights and unsigned activations fit");
    static_assert(WIDE || 2 * (2 * LARGEST - 1) * 127 <= 32767, "and of unsigned weights and signed activations");
    static constexpr bool spans(int j) { return 4 * j < K && 4 * j + 3 >= K; }
    static constexpr bool both(int j) { return spans(j) && OFF == 4; }
    static constexpr int base(int j) { return 4 * j + 3 < K ? 0 : 4 * j >= K ? 16 : OFF == 4 ? 0 : 8; }

    struct Weights {
        I index[Q], w[Q], correction[2];
    };
    I start[Q], first_only, second_only;

    explicit Gathered(const Matrix &m) {
        for (int j = 0; j < Q; ++j) {
            uint8_t a[4];
            for (int i = 0; i < 4; ++i) {
                const int s = 4 * j + i, block = s / K;
                a[i] = uint8_t((both(j) ? 0 : block * BLOCK - base(j)) + m.window_starts[s % K]);
            }
            int32_t packed;
            std::memcpy(&packed, a, 4);
            start[j] = _mm256_set1_epi32(packed);
        }
        // K = 6, 10: the spanning quad has two weights of each block
        first_only = _mm256_set1_epi32(int32_t(0x80800000u));
        second_only = _mm256_set1_epi32(0x00008080);
    }

    // Where in its table a quad reads, and its weights without a sign.
    void quad(int in_chunk, int j, int half, I &index, I &w) const {
        Source::quad(in_chunk, j, half, index, w);
        if (OFF != 4) index = _mm256_add_epi8(index, start[j]);  // a free choice starts at 0
    }
    static I middle() { return _mm256_set1_epi8(char(LARGEST)); }

    struct Tables {
        I of[3];
    };
    static Tables tables(const void *activations) {
        const uint8_t *a = (const uint8_t *)activations;
        return {{table(a), K % 4 ? table(a + 8) : _mm256_setzero_si256(), table(a + 16)}};
    }
    I gather(I index, int j, const Tables &tables) const {
        if (both(j)) {
            return _mm256_or_si256(_mm256_shuffle_epi8(tables.of[0], _mm256_or_si256(index, first_only)),
                                   _mm256_shuffle_epi8(tables.of[2], _mm256_or_si256(index, second_only)));
        }
        return _mm256_shuffle_epi8(tables.of[base(j) / 8], index);
    }
    static I wide_product(I g, I w) { return widen(_mm256_maddubs_epi16(_mm256_abs_epi8(g), _mm256_sign_epi8(w, g))); }

    void read(Weights &t, int in_chunk, int half) const {
        for (int j = 0; j < Q; ++j) {
            quad(in_chunk, j, half, t.index[j], t.w[j]);
            t.w[j] = _mm256_sub_epi8(t.w[j], middle());
        }
        if constexpr (WIDE) return;
        for (int begin = 0; begin < Q; begin += TOGETHER) {
            I sum = t.w[begin];
            for (int j = begin + 1; j < Q && j < begin + TOGETHER; ++j) sum = _mm256_add_epi8(sum, t.w[j]);
            sum = _mm256_maddubs_epi16(_mm256_set1_epi8(char(128)), sum);
            t.correction[begin / TOGETHER] = _mm256_sub_epi16(_mm256_setzero_si256(), sum);
        }
    }
    I dot(const Weights &t, const Activations &x, size_t e) const {
        const Tables a = tables(WIDE ? (const void *)(x.integers.data() + e * PAIR) : x.biased.data() + e * PAIR);
        I sum = _mm256_setzero_si256();
        if constexpr (WIDE) {
            for (int j = 0; j < Q; ++j) sum = _mm256_add_epi32(sum, wide_product(gather(t.index[j], j, a), t.w[j]));
            return sum;
        }
        for (int begin = 0; begin < Q; begin += TOGETHER) {
            I part = t.correction[begin / TOGETHER];
            for (int j = begin; j < Q && j < begin + TOGETHER; ++j)
                part = _mm256_add_epi16(part, _mm256_maddubs_epi16(gather(t.index[j], j, a), t.w[j]));
            sum = begin ? _mm256_add_epi32(sum, widen(part)) : widen(part);
        }
        return sum;
    }

    void dots(const Activations &x, size_t e, int in_chunk, I (&sum)[2]) const {
        const Tables a = tables(x.integers.data() + e * PAIR);
        I part[2];
#pragma GCC unroll 8
        for (int j = 0; j < Q; ++j) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                I index, w;
                quad(in_chunk, j, half, index, w);
                const I g = gather(index, j, a);
                if (WIDE) {
                    const I product = wide_product(g, _mm256_sub_epi8(w, middle()));
                    sum[half] = j ? held(_mm256_add_epi32(sum[half], product)) : product;
                    continue;
                }
                const I product = held(_mm256_sub_epi16(_mm256_maddubs_epi16(w, g), _mm256_maddubs_epi16(middle(), g)));
                part[half] = j % TOGETHER ? held(_mm256_add_epi16(part[half], product)) : product;
                if ((j + 1) % TOGETHER && j + 1 < Q) continue;
                sum[half] = j < TOGETHER ? widen(part[half]) : _mm256_add_epi32(sum[half], widen(part[half]));
            }
        }
    }
};

struct Dense4 {
    static constexpr int PAIRS = 1, BYTES = 256;
    static_assert(QUADS * 2 * 15 * 127 <= 32767, "sums fit in 16 bits");
    struct Weights {
        I w[QUADS];
    };
    const uint8_t *at = nullptr;
    const int offset;

    explicit Dense4(const Matrix &m) : offset(m.offset()) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair() {}
    void next_chunk() { at += BYTES; }
    void read(Weights &t, int, int half) const {
        for (int j = 0; j < QUADS; j += 2) {
            const I v = load(at + j * 32 + half * 32);
            t.w[j] = nibbles(v);
            t.w[j + 1] = nibbles(_mm256_srli_epi16(v, 4));
        }
    }
    I dot(const Weights &t, const Activations &x, size_t e) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        I sum = _mm256_setzero_si256();
        for (int j = 0; j < QUADS; ++j)
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(t.w[j], four(a + j * LANE)));
        return _mm256_sub_epi32(widen(sum), _mm256_set1_epi32(offset * x.sum[e]));
    }
    void dots(const Activations &x, size_t e, int, I (&sum)[2]) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        I part[2];
#pragma GCC unroll 8
        for (int j = 0; j < QUADS; j += 2) {
            const I first = four(a + j * LANE), second = four(a + (j + 1) * LANE);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const I v = held(load(at + j * 32 + half * 32));
                const I product = _mm256_maddubs_epi16(nibbles(v), first);
                part[half] = held(j ? _mm256_add_epi16(part[half], product) : product);
                const I next = _mm256_maddubs_epi16(nibbles(_mm256_srli_epi16(v, 4)), second);
                part[half] = held(_mm256_add_epi16(part[half], next));
            }
        }
        const I correction = _mm256_set1_epi32(offset * x.sum[e]);
        for (int half = 0; half < 2; ++half) sum[half] = _mm256_sub_epi32(widen(part[half]), correction);
    }
};

// Weights without a sign, two quads of which add up in 16 bits.
struct Dense6 {
    static constexpr int PAIRS = 1, BYTES = 384;
    static_assert(2 * 2 * 63 * 127 <= 32767, "sums of two quads fit in 16 bits");
    struct Weights {
        I w[QUADS];
    };
    const uint8_t *at = nullptr;
    const int offset;

    explicit Dense6(const Matrix &m) : offset(m.offset()) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair() {}
    void next_chunk() { at += BYTES; }
    // Quads j .. j + 3, the last of which lies in the two highest bits of the others.
    void four_quads(int j, int half, I *w) const {
        const uint8_t *three = at + j / 4 * 192 + half * 32;
        const I a = held(load(three)), b = held(load(three + 64)), c = held(load(three + 128));
        w[0] = field(a, 0, 6), w[1] = field(b, 0, 6), w[2] = field(c, 0, 6);
        w[3] = _mm256_or_si256(_mm256_or_si256(masked(a, 6, 3), masked(b, 4, 12)), masked(c, 2, 48));
    }
    static I two(const I *w, I first, I second) {
        return widen(_mm256_add_epi16(_mm256_maddubs_epi16(w[0], first), _mm256_maddubs_epi16(w[1], second)));
    }
    void read(Weights &t, int, int half) const {
        for (int j = 0; j < QUADS; j += 4) four_quads(j, half, t.w + j);
    }
    I dot(const Weights &t, const Activations &x, size_t e) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        I sum = _mm256_set1_epi32(-offset * x.sum[e]);
        for (int j = 0; j < QUADS; j += 2)
            sum = _mm256_add_epi32(sum, two(t.w + j, four(a + j * LANE), four(a + (j + 1) * LANE)));
        return sum;
    }
    void dots(const Activations &x, size_t e, int, I (&sum)[2]) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        sum[0] = sum[1] = _mm256_set1_epi32(-offset * x.sum[e]);
#pragma GCC unroll 2
        for (int j = 0; j < QUADS; j += 4) {
            const I v[4] = {four(a + j * LANE), four(a + (j + 1) * LANE), four(a + (j + 2) * LANE), four(a + (j + 3) * LANE)};
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                I w[4];
                four_quads(j, half, w);
                sum[half] = _mm256_add_epi32(sum[half], _mm256_add_epi32(two(w, v[0], v[1]), two(w + 2, v[2], v[3])));
            }
        }
    }
};

// Signed bytes on both sides: |a| times the weight with a's sign.
struct Bytes {
    struct Weights {
        I w[QUADS];
    };
    I dot(const Weights &t, const Activations &x, size_t e) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        I sum = _mm256_setzero_si256();
        for (int j = 0; j < QUADS; ++j) {
            const I v = four(a + j * LANE);
            sum = _mm256_add_epi32(sum, widen(_mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(t.w[j], v))));
        }
        return sum;
    }
};

struct Dense8 : Bytes {
    static constexpr int PAIRS = 1, BYTES = 512;
    const uint8_t *at = nullptr;

    explicit Dense8(const Matrix &) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair() {}
    void next_chunk() { at += BYTES; }
    void read(Weights &t, int, int half) const {
        for (int j = 0; j < QUADS; ++j) t.w[j] = load(at + j * 64 + half * 32);
    }
    void dots(const Activations &x, size_t e, int, I (&sum)[2]) const {
        const int8_t *a = x.integers.data() + e * PAIR;
#pragma GCC unroll 8
        for (int j = 0; j < QUADS; ++j) {
            const I v = four(a + j * LANE), size = _mm256_abs_epi8(v);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const I product = widen(_mm256_maddubs_epi16(size, _mm256_sign_epi8(load(at + j * 64 + half * 32), v)));
                sum[half] = j ? _mm256_add_epi32(sum[half], product) : product;
            }
        }
    }
};

// Where 32 weights find themselves among their packed bytes, in two lanes of 16: the sum of what two bytes of the mask put
// in each. The first lane counts from the beginning of the packed bytes; the second from 16 before their end, which needs no
// count of the first. A sum with NONE has its highest bit set, and puts a zero.
struct ExpandTable {
    static constexpr int NONE = 0xc0;
    alignas(64) uint8_t part[4][256][16];
    constexpr ExpandTable() : part() {
        for (int mask = 0; mask < 256; ++mask) {
            int count = 0;
            for (int bit = 0; bit < 8; ++bit) count += mask >> bit & 1;
            for (int bit = 0, next = 0; bit < 8; ++bit) {
                const bool kept = mask >> bit & 1;
                part[0][mask][bit] = uint8_t(kept ? next : NONE);
                part[0][mask][8 + bit] = uint8_t(count);
                part[1][mask][8 + bit] = uint8_t(kept ? next : NONE);
                part[2][mask][bit] = uint8_t(kept ? 16 - count + next : NONE);
                part[2][mask][8 + bit] = 16;
                part[3][mask][bit] = uint8_t(-count);
                part[3][mask][8 + bit] = uint8_t(kept ? next - count : NONE);
                next += kept;
            }
        }
    }
};
constexpr ExpandTable EXPAND;

static inline I two_lanes(const uint8_t *low, const uint8_t *high) {
    const __m128i v = _mm_loadu_si128((const __m128i *)low);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_loadu_si128((const __m128i *)high), 1);
}

// The 64 weights of a quad from the packed bytes at v by its mask; moves v on.
static inline void expand(const uint8_t *&v, uint64_t mask, const ExpandTable *table, I (&w)[2]) {
    // Bytes of the mask, times the 16 bytes of a row of the table: the first two, and every other of the rest.
    uint64_t even = mask >> 12 & 0x0ff00ff00ff0, odd = mask >> 20 & 0x0ff00ff00ff0;
    const uint8_t *rows[8] = {table->part[0][mask & 255], table->part[1][mask >> 8 & 255]};
#pragma GCC unroll 3
    for (int i = 2; i < 8; i += 2) {
        rows[i] = table->part[i % 4][0] + (i < 6 ? uint16_t(even) : even);
        rows[i + 1] = table->part[i % 4 + 1][0] + (i < 6 ? uint16_t(odd) : odd);
        even >>= 16, odd >>= 16;
        asm("" : "+r"(even), "+r"(odd));  // or the compiler copies them for every shift
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const uint8_t *begin = v, **row = rows + half * 4;
        v += _mm_popcnt_u32(uint32_t(mask >> half * 32));
        const I index = _mm256_add_epi8(two_lanes(row[0], row[2]), two_lanes(row[1], row[3]));
        w[half] = _mm256_shuffle_epi8(two_lanes(begin, v - 16), index);
    }
}

template <int BITS>
struct Masked : Bytes {
    static constexpr int PAIRS = 1, BYTES = 32 * BITS;  // about: three to six of ten weights
    static_assert(BITS == 8 || QUADS * 2 * 8 * 127 <= 32767, "sums of 4-bit weights fit in 16 bits");
    const uint8_t *at = nullptr;
    const uint64_t *mask = nullptr, *mask_end = nullptr;
    const uint8_t *packed = nullptr;  // the pair's weights, a byte each
    // 4-bit weights are unpacked a pair ahead: what is loaded from two stores at once has to wait for both to leave the core.
    alignas(32) uint8_t rooms[2][32 + PAIR * ROWS + 32], tile[PAIR * ROWS];
    int room = 0;

    explicit Masked(const Matrix &) {}
    void row_block(const Matrix &m, int block) {
        at = m.values + m.value_starts[block];
        mask = m.mask + size_t(block) * m.pairs * QUADS;
        mask_end = mask + size_t(m.pairs) * QUADS;
        if (BITS == 4) unpack(mask);
    }
    void pair() {
        packed = BITS == 8 ? at : rooms[room] + 32;
        if (BITS == 4 && mask + QUADS < mask_end) unpack(mask + QUADS);
    }
    void next_chunk() { mask += QUADS; }
    void unpack(const uint64_t *next) {
        int count = 0;
        for (int j = 0; j < QUADS; ++j) count += int(_mm_popcnt_u64(next[j]));
        uint8_t *to = rooms[room ^= 1] + 32;
        for (int i = 0; i < count; i += 64) {
#pragma GCC unroll 2
            for (int k = i; k < i + 64; k += 32) {
                const I wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(at + k / 2)));
                const I both = nibbles(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)));
                _mm256_store_si256((I *)(to + k), _mm256_sub_epi8(both, _mm256_set1_epi8(8)));
            }
        }
        at += (count + 1) / 2;
    }
    // Calls use(quad, half, weights) for all of the pair.
    template <class Use>
    void each(Use use) {
        const uint8_t *v = packed;
        const uint64_t *masks = mask;
        const ExpandTable *table = &EXPAND;
        asm("" : "+r"(masks), "+r"(table));  // nothing is kept for the pair's next entry, as in run_one
#pragma GCC unroll 1
        for (int j = 0; j < QUADS; ++j) {
            asm("" : "+r"(table));  // one register for its four parts
            I w[2];
            expand(v, masks[j], table, w);
            use(j, 0, w[0]);
            use(j, 1, w[1]);
        }
        if (BITS == 8) at = v;
    }
    void read(Weights &t, int, int half) {
        if (half == 0) each([&](int j, int h, I w) { _mm256_store_si256((I *)(tile + j * 64 + h * 32), w); });
        for (int j = 0; j < QUADS; ++j) t.w[j] = load(tile + j * 64 + half * 32);
    }
    void dots(const Activations &x, size_t e, int, I (&sum)[2]) {
        const int8_t *a = x.integers.data() + e * PAIR;
        sum[0] = sum[1] = _mm256_setzero_si256();
        each([&](int j, int half, I w) {
            const I v = four(a + j * LANE);
            const I product = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(w, v));
            sum[half] = held(BITS == 8 ? _mm256_add_epi32(sum[half], widen(product)) : _mm256_add_epi16(sum[half], product));
        });
        if (BITS == 4)
            for (I &s : sum) s = widen(s);
    }
};

struct Scales {
    __m256 scale[2], minimum[2];
    Scales(const Matrix &m, int block, int group) {
        const size_t at = (size_t(block) * m.groups + group) * ROWS;
        for (int half = 0; half < 2; ++half) {
            scale[half] = V::load(m.scales + at + half * 8);
            minimum[half] = m.minima ? V::load(m.minima + at + half * 8) : V::zero();
        }
    }
};

// One token: its sums stay in registers, and both halves of the rows share what they read of the activations.
template <class Decoder>
static void run_one(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    Decoder d(m);
    const bool minima = std::is_same_v<Decoder, Dense4> && m.minima;  // no other layout has them
    for (int block = begin; block < end; ++block, out += ROWS) {
        __m256 sums[2] = {V::zero(), V::zero()};
        d.row_block(m, block);
        Scales scales(m, block, 0);
        int until = m.pairs_per_group, group = 0;
        for (int chunk = 0; chunk < m.pairs; chunk += Decoder::PAIRS) {
            prefetch(d.at, Decoder::BYTES);
#pragma GCC unroll 4
            for (int i = 0; i < Decoder::PAIRS; ++i) {
                const int p = chunk + i;
                if (p == until && group + 1 < m.groups) {
                    scales = Scales(m, block, ++group);
                    until += m.pairs_per_group;
                }
                d.pair();
                size_t e = size_t(p) * 2;  // of one token, room for two entries
                const size_t last = e + x.extras[p];
                do {  // the second vector of an outlier decodes the weights again: there are too few registers for them
                    asm("" : "+r"(d.at));  // or the compiler takes what is the same for both out, and spills it
                    I dots[2];
                    d.dots(x, e, i, dots);
                    const __m256 a = _mm256_broadcast_ss(&x.scale[e]);
                    for (int half = 0; half < 2; ++half) {
                        __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[half]), scales.scale[half]);
                        if (minima) y = _mm256_fmadd_ps(_mm256_set1_ps(float(x.sum[e])), scales.minimum[half], y);
                        sums[half] = _mm256_fmadd_ps(y, a, sums[half]);
                    }
                } while (++e <= last);
            }
            d.next_chunk();
        }
        V::store(out, sums[0]);
        V::store(out + 8, sums[1]);
    }
}

// Many tokens: sums stay in `out`, in the first-level cache.
template <class Decoder>
static void run_many(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    Decoder d(m);
    const bool minima = m.minima != nullptr;
    for (int block = begin; block < end; ++block, out += x.tokens * ROWS) {
        std::memset(out, 0, size_t(x.tokens) * ROWS * sizeof(float));
        d.row_block(m, block);
        for (int chunk = 0; chunk < m.pairs; chunk += Decoder::PAIRS) {
#pragma GCC unroll 4
            for (int i = 0; i < Decoder::PAIRS; ++i) {
                const int p = chunk + i;
                const Scales scales(m, block, std::min(p / m.pairs_per_group, m.groups - 1));
                d.pair();
                const size_t first = size_t(p) * x.capacity;
                const int entries = x.tokens + x.extras[p];
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    typename Decoder::Weights w;
                    d.read(w, i, half);
                    auto add = [&](size_t e, float *to) {
                        const __m256 a = _mm256_broadcast_ss(&x.scale[e]);
                        __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(d.dot(w, x, e)), scales.scale[half]);
                        if (minima) y = _mm256_fmadd_ps(_mm256_set1_ps(float(x.sum[e])), scales.minimum[half], y);
                        V::store(to, _mm256_fmadd_ps(y, a, V::load(to)));
                    };
                    float *to = out + half * 8;
                    for (int t = 0; t < x.tokens; ++t, to += ROWS) add(first + t, to);
                    for (int e = x.tokens; e < entries; ++e) add(first + e, out + size_t(x.token[first + e]) * ROWS + half * 8);
                }
            }
            d.next_chunk();
        }
    }
}

template <class Decoder>
static void run(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    x.tokens == 1 ? run_one<Decoder>(m, x, begin, end, out) : run_many<Decoder>(m, x, begin, end, out);
}

template <int K>
static void run_kept(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    if (m.kind == Kind::planes) return m.bits == 4 ? run<Gathered<Planes<K, 4>>>(m, x, begin, end, out)
                                                   : run<Gathered<Planes<K, 8>>>(m, x, begin, end, out);
    switch (m.offset_bits) {
        case 2: return run<Gathered<Banded<K, 2>>>(m, x, begin, end, out);
        case 3: return run<Gathered<Banded<K, 3>>>(m, x, begin, end, out);
        default: return run<Gathered<Banded<K, 4>>>(m, x, begin, end, out);
    }
}

static void multiply(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    if (m.kind == Kind::dense)
        return m.bits == 4   ? run<Dense4>(m, x, begin, end, out)
               : m.bits == 6 ? run<Dense6>(m, x, begin, end, out)
                             : run<Dense8>(m, x, begin, end, out);
    if (m.kind == Kind::mask)
        return m.bits == 4 ? run<Masked<4>>(m, x, begin, end, out) : run<Masked<8>>(m, x, begin, end, out);
    switch (m.keep) {
        case 4: return run_kept<4>(m, x, begin, end, out);
        case 6: return run_kept<6>(m, x, begin, end, out);
        case 8: return run_kept<8>(m, x, begin, end, out);
        case 10: return run_kept<10>(m, x, begin, end, out);
        default: return run_kept<12>(m, x, begin, end, out);
    }
}

}  // namespace avx2

const Kernels avx2_kernels = {
    "avx2",     avx2::multiply, avx2::quantize, avx2::rms_norm, avx2::layer_norm, avx2::gate,
    avx2::silu, avx2::gelu,     avx2::rotate,   avx2::store,    avx2::attend,
};

}  // namespace zoo
