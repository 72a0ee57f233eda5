// AVX-512 with VNNI, VBMI and VBMI2: 16 rows x 4 bytes to a vector, products by vpdpbusd, masks by vpexpandb.
//
// vpdpbusd multiplies unsigned by signed bytes and adds four neighbours in 32 bits. Gathered activations go in
// unsigned, as a + 128, and 128 * sum(w) is taken off again; dense weights go in unsigned themselves.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace zoo {
namespace avx512 {

struct V {
    using F = __m512;
    static constexpr int N = 16;
    static F zero() { return _mm512_setzero_ps(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float *x) { return _mm512_loadu_ps(x); }
    static F load(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }
    static F load(const int8_t *x) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
    }
    static float one(const uint16_t *x) { return _cvtsh_ss(*x); }
    static float one(const int8_t *x) { return *x; }
    static void store(float *to, F x) { _mm512_storeu_ps(to, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static void sums(const F *a, float *to) {  // of four vectors
        auto both = [](F x, F y) { return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
        const __m512d x = _mm512_castps_pd(both(a[0], a[1])), y = _mm512_castps_pd(both(a[2], a[3]));
        const F four = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
    }
    static float largest(F a) { return _mm512_reduce_max_ps(a); }
    static void to_half(const float *x, uint16_t *to, int n) {
        int i = 0;
        for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtps_ph(load(x + i), 0));
        for (; i < n; ++i) to[i] = _cvtss_sh(x[i], 0);
    }
};

#include "ops.inl"

using I = __m512i;

static inline I load(const void *p) { return _mm512_loadu_si512(p); }
static inline I table(const uint8_t *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
static inline I masked(I v, int shift, int mask) {
    return _mm512_and_si512(shift ? _mm512_srli_epi16(v, shift) : v, _mm512_set1_epi8(char(mask)));
}
static inline I field(I v, int shift, int bits) { return masked(v, shift, (1 << bits) - 1); }
// Of four vectors of 6-bit weights, the one that lies in the two highest bits of the others.
static inline I fourth(I a, I b, I c) {
    return _mm512_ternarylogic_epi32(masked(a, 6, 3), masked(b, 4, 12), masked(c, 2, 48), 0xfe);  // or
}
static inline I flip(I v) { return _mm512_xor_si512(v, _mm512_set1_epi8(char(128))); }
static inline I four(const int8_t *a) {
    int32_t value;
    std::memcpy(&value, a, 4);
    return _mm512_set1_epi32(value);
}

// As in kernels_avx2.cpp: which 16 of the pair's 32 columns a quad reads through its table.
template <int K, int OFF>
struct Gathered {
    static constexpr int Q = K / 2;
    static constexpr int STEP = Q == 2 ? 2 : 1;  // pairs that `run_many` takes at once: two where one has little to do
    static constexpr bool both(int j) { return OFF == 4 && 4 * j < K && 4 * j + 3 >= K; }
    static constexpr int base(int j) { return 4 * j + 3 < K ? 0 : 4 * j >= K ? 16 : OFF == 4 ? 0 : 8; }

    struct Weights {
        I index[Q], w[Q], correction;
    };
    I add[Q];

    explicit Gathered(const Matrix &m) {
        for (int j = 0; j < Q; ++j) {
            uint8_t a[4];
            for (int i = 0; i < 4; ++i) {
                const int s = 4 * j + i, block = s / K;
                a[i] = uint8_t((both(j) ? 0 : block * BLOCK - base(j)) + m.window_starts[s % K]);
            }
            int32_t packed;
            std::memcpy(&packed, a, 4);
            add[j] = _mm512_set1_epi32(packed);
        }
    }

    void finish(Weights &t) const {
        I sum = _mm512_setzero_si512();
        for (int j = 0; j < Q; ++j) {
            t.index[j] = _mm512_add_epi8(t.index[j], add[j]);
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(128)), t.w[j]);
        }
        t.correction = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
    }

    struct Tables {
        I of[3];
    };
    static Tables activations(const Activations &x, size_t e) {
        const uint8_t *a = x.biased.data() + e * PAIR;
        return {{table(a), K % 4 ? table(a + 8) : _mm512_setzero_si512(), table(a + 16)}};
    }
    static I dot(const Weights &t, const Tables &tables) {
        I sum = t.correction;
        for (int j = 0; j < Q; ++j) {
            I g;
            if (both(j)) {  // two weights of the first block, two of the second
                g = _mm512_shuffle_epi8(tables.of[0], t.index[j]);
                g = _mm512_mask_shuffle_epi8(g, 0xcccccccccccccccc, tables.of[2], t.index[j]);
            } else {
                g = _mm512_shuffle_epi8(tables.of[base(j) / 8], t.index[j]);
            }
            sum = _mm512_dpbusd_epi32(sum, g, t.w[j]);
        }
        return sum;
    }
};

template <int K, int OFF>
struct Banded : Gathered<K, OFF> {
    static constexpr int PAIRS = 1, BYTES = K / 2 * 64;
    // The weight stays in the upper bits of its byte, 2^OFF times itself.
    static constexpr float FACTOR = 1.0f / (1 << OFF);
    const uint8_t *at = nullptr;
    using Base = Gathered<K, OFF>;
    using typename Base::Weights;

    explicit Banded(const Matrix &m) : Base(m) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk() { at += BYTES; }
    void read(Weights &t, int) const {
        const I upper = _mm512_set1_epi8(char(0xff << OFF)), sign = _mm512_set1_epi8(char(128));
        for (int j = 0; j < Base::Q; ++j) {
            const I v = load(at + j * 64);
            t.index[j] = field(v, 0, OFF);
            t.w[j] = _mm512_ternarylogic_epi32(v, upper, sign, 0x6a);  // (v & upper) ^ sign
        }
        this->finish(t);
    }
};

template <int K, int WBITS, int OFF>
struct Planes : Gathered<K, OFF> {
    using Base = Gathered<K, OFF>;
    using typename Base::Weights;
    static constexpr float FACTOR = 1;
    static constexpr int PER = 8 / OFF;  // quads of offsets in a vector
    static constexpr int PAIRS = Base::Q % PER == 0 ? 1 : 2 * Base::Q % PER == 0 ? 2 : 4;
    static constexpr int BYTES = PAIRS * Base::Q * 8 * (WBITS + OFF);
    const uint8_t *at = nullptr;

    explicit Planes(const Matrix &m) : Base(m) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk() { at += BYTES; }
    void read(Weights &t, int in_chunk) const {
        const uint8_t *weights = at + PAIRS * Base::Q * 8 * OFF;
        for (int j = 0; j < Base::Q; ++j) {
            const int quad = in_chunk * Base::Q + j;
            t.index[j] = field(load(at + quad / PER * 64), quad % PER * OFF, OFF);
            t.w[j] = WBITS == 8 ? flip(load(weights + quad * 64))
                                : _mm512_sub_epi8(field(load(weights + quad / 2 * 64), quad % 2 * 4, 4),
                                                  _mm512_set1_epi8(8));
        }
        this->finish(t);
    }
};

// Weights without a sign, all four columns of a lane stored: activations are broadcast.
template <class Source>
struct Unsigned : Source {
    static constexpr int PAIRS = 1, STEP = 1;
    static constexpr float FACTOR = 1;
    struct Weights {
        I w[QUADS];
    };
    using Source::Source;
    void read(Weights &t, int) const {
        for (int j = 0; j < QUADS; ++j) t.w[j] = this->quad(j);
    }
    struct Columns {
        const int8_t *integers;
        I correction;
    };
    Columns activations(const Activations &x, size_t e) const {
        return {x.integers.data() + e * PAIR, _mm512_set1_epi32(-this->offset * x.sum[e])};
    }
    static I dot(const Weights &t, const Columns &a) {
        I sum[2] = {a.correction, _mm512_setzero_si512()};
        for (int j = 0; j < QUADS; ++j) sum[j & 1] = _mm512_dpbusd_epi32(sum[j & 1], t.w[j], four(a.integers + j * LANE));
        return _mm512_add_epi32(sum[0], sum[1]);
    }
};

template <int BITS>
struct Dense {
    static constexpr int BYTES = 64 * BITS;
    const uint8_t *at = nullptr;
    const int offset;

    explicit Dense(const Matrix &m) : offset(BITS == 8 ? 128 : m.offset()) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk() { at += BYTES; }
    I quad(int j) const {
        if (BITS == 8) return flip(load(at + j * 64));
        if (BITS == 4) return field(load(at + j / 2 * 64), j % 2 * 4, 4);
        const uint8_t *three = at + j / 4 * 192;
        return j % 4 < 3 ? field(load(three + j % 4 * 64), 0, 6) : fourth(load(three), load(three + 64), load(three + 128));
    }
};

template <int BITS>
struct Masked {
    static constexpr int BYTES = 32 * BITS;  // about: three to six of ten weights
    static constexpr int offset = 1 << (BITS - 1);
    const uint8_t *at = nullptr;
    I quads[QUADS];

    explicit Masked(const Matrix &) {}
    void row_block(const Matrix &m, int block) { at = m.values + m.value_starts[block]; }
    void next_chunk() {}
    void pair(const Matrix &m, int block, int p) {
        const uint64_t *mask = m.mask + (size_t(block) * m.pairs + p) * QUADS;
        alignas(64) uint8_t unpacked[PAIR * ROWS + 64];
        const uint8_t *v = at;
        if constexpr (BITS == 4) {
            int count = 0;
            for (int j = 0; j < QUADS; ++j) count += int(_mm_popcnt_u64(mask[j]));
            for (int i = 0; i < count; i += 64) {
                const I wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(at + i / 2)));
                const I both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
                _mm512_store_si512(unpacked + i, _mm512_and_si512(both, _mm512_set1_epi8(15)));
            }
            at += (count + 1) / 2;
            v = unpacked;
        }
        for (int j = 0; j < QUADS; ++j) {
            I next = load(v);
            asm("" : "+v"(next));  // from a register: AMD's processors expand from memory in microcode
            if constexpr (BITS == 4) quads[j] = _mm512_mask_expand_epi8(_mm512_set1_epi8(offset), mask[j], next);
            else quads[j] = flip(_mm512_maskz_expand_epi8(mask[j], next));
            v += _mm_popcnt_u64(mask[j]);
        }
        if constexpr (BITS == 8) at = v;
    }
    I quad(int j) const { return quads[j]; }
};

struct Scales {
    __m512 scale, minimum;
    Scales() = default;
    Scales(const Matrix &m, int block, int group, float factor) {
        const size_t at = (size_t(block) * m.groups + group) * ROWS;
        scale = _mm512_mul_ps(V::load(m.scales + at), V::set(factor));
        minimum = m.minima ? V::load(m.minima + at) : V::zero();
    }
};

static inline __m512 scaled(const Matrix &m, I dot, const Scales &scales, const Activations &x, size_t e) {
    const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scales.scale);
    return m.minima ? _mm512_fmadd_ps(_mm512_set1_ps(float(x.sum[e])), scales.minimum, y) : y;
}

// One token: its sums stay in a register.
template <class Decoder>
static void run_one(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    Decoder d(m);
    for (int block = begin; block < end; ++block, out += ROWS) {
        __m512 sum = V::zero();
        d.row_block(m, block);
        Scales scales(m, block, 0, Decoder::FACTOR);
        int until = m.pairs_per_group, group = 0;
        for (int chunk = 0; chunk < m.pairs; chunk += Decoder::PAIRS) {
            prefetch(d.at, Decoder::BYTES);
#pragma GCC unroll 4
            for (int i = 0; i < Decoder::PAIRS; ++i) {
                const int p = chunk + i;
                if (p == until && group + 1 < m.groups) {
                    scales = Scales(m, block, ++group, Decoder::FACTOR);
                    until += m.pairs_per_group;
                }
                d.pair(m, block, p);
                typename Decoder::Weights w;
                d.read(w, i);
                const size_t first = size_t(p) * x.capacity;
                for (size_t e = first; e < first + 1 + x.extras[p]; ++e)
                    sum = _mm512_fmadd_ps(scaled(m, d.dot(w, d.activations(x, e)), scales, x, e), _mm512_set1_ps(x.scale[e]), sum);
            }
            d.next_chunk();
        }
        V::store(out, sum);
    }
}

// Many tokens: sums stay in `out`, in the first-level cache. BLOCKS row blocks share the loads of activations, and
// Decoder::STEP pairs, which share their scales unless `alone`, the loads and stores of the sums.
template <class Decoder, int BLOCKS>
static void run_many(const Matrix &m, const Activations &x, int begin, float *out) {
    using Weights = typename Decoder::Weights;
    constexpr int STEP = Decoder::STEP;
    static_assert(Decoder::PAIRS == 1 || Decoder::PAIRS % STEP == 0, "a step lies within a chunk, or is several");
    const size_t next_block = size_t(x.tokens) * ROWS;
    std::memset(out, 0, BLOCKS * next_block * sizeof(float));
    Decoder d[2] = {Decoder(m), Decoder(m)};
    for (int b = 0; b < BLOCKS; ++b) d[b].row_block(m, begin + b);
    auto step = [&](auto steps, auto alone, int p0, int in_chunk) {
        constexpr int N = decltype(steps)::value;
        Weights w[N][BLOCKS];
        Scales scales[N][BLOCKS];
        size_t first[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            const int group = std::min((p0 + i) / m.pairs_per_group, m.groups - 1);
            first[i] = size_t(p0 + i) * x.capacity;
#pragma GCC unroll 4
            for (int b = 0; b < BLOCKS; ++b) {
                d[b].pair(m, begin + b, p0 + i);
                d[b].read(w[i][b], Decoder::PAIRS == 1 ? 0 : in_chunk + i);
                if (Decoder::PAIRS == 1) d[b].next_chunk();
                scales[i][b] = Scales(m, begin + b, group, Decoder::FACTOR);
            }
        }
        float *to = out;
        for (int t = 0; t < x.tokens; ++t, to += ROWS) {
            __m512 sum[BLOCKS], unscaled[BLOCKS], unshifted = V::zero();
#pragma GCC unroll 4
            for (int b = 0; b < BLOCKS; ++b) sum[b] = V::load(to + b * next_block);
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
                const size_t e = first[i] + t;
                const __m512 scale = _mm512_set1_ps(x.scale[e]);
                const auto table = d[0].activations(x, e);
                if (m.minima) unshifted = _mm512_fmadd_ps(scale, _mm512_set1_ps(float(x.sum[e])), i && !alone ? unshifted : V::zero());
#pragma GCC unroll 4
                for (int b = 0; b < BLOCKS; ++b) {
                    const __m512 y = _mm512_cvtepi32_ps(d[b].dot(w[i][b], table));
                    unscaled[b] = i && !alone ? _mm512_fmadd_ps(y, scale, unscaled[b]) : _mm512_mul_ps(y, scale);
                    if (!alone && i + 1 < N) continue;
                    sum[b] = _mm512_fmadd_ps(unscaled[b], scales[i][b].scale, sum[b]);
                    if (m.minima) sum[b] = _mm512_fmadd_ps(unshifted, scales[i][b].minimum, sum[b]);
                }
            }
#pragma GCC unroll 4
            for (int b = 0; b < BLOCKS; ++b) V::store(to + b * next_block, sum[b]);
        }
        for (int i = 0; i < N; ++i) {
            for (size_t e = first[i] + x.tokens; e < first[i] + x.tokens + x.extras[p0 + i]; ++e) {
                const auto table = d[0].activations(x, e);
                for (int b = 0; b < BLOCKS; ++b) {
                    float *row = out + b * next_block + size_t(x.token[e]) * ROWS;
                    V::store(row, _mm512_fmadd_ps(scaled(m, d[b].dot(w[i][b], table), scales[i][b], x, e),
                                                  _mm512_set1_ps(x.scale[e]), V::load(row)));
                }
            }
        }
    };
    auto all = [&](auto alone) {
        if constexpr (Decoder::PAIRS == 1) {
            int p = 0;
            for (; p + STEP <= m.pairs; p += STEP) step(std::integral_constant<int, STEP>(), alone, p, 0);
            for (; p < m.pairs; ++p) step(std::integral_constant<int, 1>(), alone, p, 0);
        } else {
            for (int chunk = 0; chunk < m.pairs; chunk += Decoder::PAIRS) {
#pragma GCC unroll 4
                for (int i = 0; i < Decoder::PAIRS; i += STEP) step(std::integral_constant<int, STEP>(), alone, chunk + i, i);
                for (int b = 0; b < BLOCKS; ++b) d[b].next_chunk();
            }
        }
    };
    // Steps begin at multiples of STEP: none crosses into the next group where that divides a group.
    m.groups > 1 && m.pairs_per_group % STEP ? all(std::true_type()) : all(std::false_type());
}

template <class Decoder>
static void run(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    if (x.tokens == 1) return run_one<Decoder>(m, x, begin, end, out);
    for (; begin + 2 <= end; begin += 2, out += size_t(2) * x.tokens * ROWS) run_many<Decoder, 2>(m, x, begin, out);
    if (begin < end) run_many<Decoder, 1>(m, x, begin, out);
}

template <int K>
static void run_kept(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    if (m.kind == Kind::planes) return m.bits == 4 ? run<Planes<K, 4, 2>>(m, x, begin, end, out)
                                                   : run<Planes<K, 8, 4>>(m, x, begin, end, out);
    switch (m.offset_bits) {
        case 2: return run<Banded<K, 2>>(m, x, begin, end, out);
        case 3: return run<Banded<K, 3>>(m, x, begin, end, out);
        default: return run<Banded<K, 4>>(m, x, begin, end, out);
    }
}

static void multiply(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    if (m.kind == Kind::dense)
        return m.bits == 4   ? run<Unsigned<Dense<4>>>(m, x, begin, end, out)
               : m.bits == 6 ? run<Unsigned<Dense<6>>>(m, x, begin, end, out)
                             : run<Unsigned<Dense<8>>>(m, x, begin, end, out);
    if (m.kind == Kind::mask)
        return m.bits == 4 ? run<Unsigned<Masked<4>>>(m, x, begin, end, out)
                           : run<Unsigned<Masked<8>>>(m, x, begin, end, out);
    switch (m.keep) {
        case 4: return run_kept<4>(m, x, begin, end, out);
        case 6: return run_kept<6>(m, x, begin, end, out);
        case 8: return run_kept<8>(m, x, begin, end, out);
        case 10: return run_kept<10>(m, x, begin, end, out);
        default: return run_kept<12>(m, x, begin, end, out);
    }
}

}  // namespace avx512

const Kernels avx512_kernels = {
    "avx512",     avx512::multiply, avx512::quantize, avx512::rms_norm, avx512::layer_norm, avx512::gate,
    avx512::silu, avx512::gelu,     avx512::rotate,   avx512::store,    avx512::attend,
};

}  // namespace zoo
