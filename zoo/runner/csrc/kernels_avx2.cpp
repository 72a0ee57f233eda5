// AVX2 with FMA and F16C: 8 rows x 4 bytes to a vector, products by vpmaddubsw.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits. Gathered activations go in
// unsigned, as a + 128, and 128 * sum(w) is taken off again; 4-bit dense weights go in unsigned themselves.
// 16-bit sums may wrap on the way: only the corrected sum of a pair has to fit, and does (see `Gathered`).

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

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
static inline I table(const uint8_t *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
static inline I nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
static inline I shift_right(I v, int n) { return n ? _mm256_srli_epi16(v, n) : v; }
static inline I field(I v, int shift, int bits) {
    return _mm256_and_si256(shift_right(v, shift), _mm256_set1_epi8(char((1 << bits) - 1)));
}
static inline I widen(I sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

// Quads of a banded pair read their activations through a table of 16 of its 32 columns: the first block, the
// second, or for the quad that holds the end of one and the beginning of the other, the 16 in the middle,
// which windows of up to 8 columns never leave. A free choice needs both blocks there.
template <int K, int WBITS, int OFF>
struct Gathered {
    static constexpr int Q = K / 2;
    static constexpr bool SPLIT = WBITS == 6 && K > 8;  // the corrected sums of a pair need two halves
    static constexpr bool WIDE = WBITS == 8;            // products fill 16 bits
    static constexpr bool spans(int j) { return 4 * j < K && 4 * j + 3 >= K; }
    static constexpr bool both(int j) { return spans(j) && OFF == 4; }
    static constexpr int base(int j) { return 4 * j + 3 < K ? 0 : 4 * j >= K ? 16 : OFF == 4 ? 0 : 8; }

    struct Weights {
        I index[Q], w[Q], correction[2];
    };
    I add[Q], first_only, second_only;

    explicit Gathered(const Matrix &m) {
        for (int j = 0; j < Q; ++j) {
            uint8_t a[4];
            for (int i = 0; i < 4; ++i) {
                const int s = 4 * j + i, block = s / K;
                a[i] = uint8_t((both(j) ? 0 : block * BLOCK - base(j)) + m.window_starts[s % K]);
            }
            int32_t packed;
            std::memcpy(&packed, a, 4);
            add[j] = _mm256_set1_epi32(packed);
        }
        // K = 6, 10: the spanning quad has two weights of each block
        first_only = _mm256_set1_epi32(int32_t(0x80800000u));
        second_only = _mm256_set1_epi32(0x00008080);
    }

    // Called with offsets in `index` and unsigned weights in `w`.
    void finish(Weights &t) const {
        const I middle = _mm256_set1_epi8(char(1 << (WBITS - 1)));
        for (int j = 0; j < Q; ++j) {
            t.index[j] = _mm256_add_epi8(t.index[j], add[j]);
            t.w[j] = _mm256_sub_epi8(t.w[j], middle);
        }
        if constexpr (WIDE) return;
        const I bias = _mm256_set1_epi8(char(128));
        t.correction[0] = t.correction[1] = _mm256_setzero_si256();
        for (int j = 0; j < Q; ++j) {
            I &c = t.correction[SPLIT && j >= 3];
            c = _mm256_sub_epi16(c, _mm256_maddubs_epi16(bias, t.w[j]));
        }
    }

    I gather(const Weights &t, int j, const I *tables) const {
        if (both(j)) {
            return _mm256_or_si256(_mm256_shuffle_epi8(tables[0], _mm256_or_si256(t.index[j], first_only)),
                                   _mm256_shuffle_epi8(tables[2], _mm256_or_si256(t.index[j], second_only)));
        }
        return _mm256_shuffle_epi8(tables[base(j) / 8], t.index[j]);
    }

    I dot(const Weights &t, const Activations &x, size_t e) const {
        const uint8_t *a = WIDE ? (const uint8_t *)x.integers.data() + e * PAIR : x.biased.data() + e * PAIR;
        const I tables[3] = {table(a), K % 4 ? table(a + 8) : _mm256_setzero_si256(), table(a + 16)};
        if constexpr (WIDE) {
            I sum = _mm256_setzero_si256();
            for (int j = 0; j < Q; ++j) {
                const I g = gather(t, j, tables);
                sum = _mm256_add_epi32(
                    sum, widen(_mm256_maddubs_epi16(_mm256_abs_epi8(g), _mm256_sign_epi8(t.w[j], g))));
            }
            return sum;
        }
        I sum[2] = {t.correction[0], t.correction[1]};
        for (int j = 0; j < Q; ++j) {
            I &s = sum[SPLIT && j >= 3];
            s = _mm256_add_epi16(s, _mm256_maddubs_epi16(gather(t, j, tables), t.w[j]));
        }
        return SPLIT ? _mm256_add_epi32(widen(sum[0]), widen(sum[1])) : widen(sum[0]);
    }
};

template <int K, int OFF>
struct Banded : Gathered<K, 8 - OFF, OFF> {
    static constexpr int PAIRS = 1, BYTES = K / 2 * 64;
    const uint8_t *at = nullptr;
    using Base = Gathered<K, 8 - OFF, OFF>;
    using typename Base::Weights;

    explicit Banded(const Matrix &m) : Base(m) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk(const Matrix &) { at += BYTES; }
    void read(const Matrix &, Weights &t, int, int half) const {
        for (int j = 0; j < Base::Q; ++j) {
            const I v = load(at + j * 64 + half * 32);
            t.index[j] = field(v, 0, OFF);
            t.w[j] = field(v, OFF, 8 - OFF);
        }
        this->finish(t);
    }
};

template <int K, int WBITS, int OFF>
struct Planes : Gathered<K, WBITS, OFF> {
    using Base = Gathered<K, WBITS, OFF>;
    using typename Base::Weights;
    static constexpr int PER = 8 / OFF;  // quads of offsets in a vector
    static constexpr int PAIRS = Base::Q % PER == 0 ? 1 : 2 * Base::Q % PER == 0 ? 2 : 4;
    static constexpr int BYTES = PAIRS * Base::Q * 8 * (WBITS + OFF);
    const uint8_t *at = nullptr;

    explicit Planes(const Matrix &m) : Base(m) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk(const Matrix &) { at += BYTES; }
    void read(const Matrix &, Weights &t, int in_chunk, int half) const {
        const uint8_t *weights = at + PAIRS * Base::Q * 8 * OFF;
        for (int j = 0; j < Base::Q; ++j) {
            const int quad = in_chunk * Base::Q + j;
            t.index[j] = field(load(at + quad / PER * 64 + half * 32), quad % PER * OFF, OFF);
            t.w[j] = WBITS == 8 ? load(weights + quad * 64 + half * 32)
                                : field(load(weights + quad / 2 * 64 + half * 32), quad % 2 * 4, 4);
        }
        this->finish(t);
    }
};

struct Dense4 {
    static constexpr int PAIRS = 1, BYTES = 256;
    struct Weights {
        I w[QUADS];
    };
    const uint8_t *at = nullptr;
    const int offset;

    explicit Dense4(const Matrix &m) : offset(m.offset()) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk(const Matrix &) { at += BYTES; }
    void read(const Matrix &, Weights &t, int, int half) const {
        for (int j = 0; j < QUADS; j += 2) {
            const I v = load(at + j * 32 + half * 32);
            t.w[j] = nibbles(v);
            t.w[j + 1] = nibbles(_mm256_srli_epi16(v, 4));
        }
    }
    I dot(const Weights &t, const Activations &x, size_t e) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        I sum = _mm256_setzero_si256();
        for (int j = 0; j < QUADS; ++j) {
            int32_t four;
            std::memcpy(&four, a + j * LANE, 4);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(t.w[j], _mm256_set1_epi32(four)));
        }
        return _mm256_sub_epi32(widen(sum), _mm256_set1_epi32(offset * x.sum[e]));
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
            int32_t four;
            std::memcpy(&four, a + j * LANE, 4);
            const I v = _mm256_set1_epi32(four);
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
    void pair(const Matrix &, int, int) {}
    void next_chunk(const Matrix &) { at += BYTES; }
    void read(const Matrix &, Weights &t, int, int half) const {
        for (int j = 0; j < QUADS; ++j) t.w[j] = load(at + j * 64 + half * 32);
    }
};

// Where the packed bytes of 8 weights go, per byte of the mask; 0x80 puts a zero. The first 8 weights count from
// the beginning of their packed bytes, the second 8 from the end of theirs, which needs no count of the first.
struct ExpandTable {
    alignas(64) uint8_t first[256][8], second[256][8];
    constexpr ExpandTable() : first(), second() {
        for (int mask = 0; mask < 256; ++mask) {
            int count = 0;
            for (int bit = 0; bit < 8; ++bit) count += mask >> bit & 1;
            for (int bit = 0, next = 0; bit < 8; ++bit) {
                const bool kept = mask >> bit & 1;
                first[mask][bit] = kept ? uint8_t(next) : 0x80;
                second[mask][bit] = kept ? uint8_t(16 - count + next) : 0x80;
                next += kept;
            }
        }
    }
};
constexpr ExpandTable EXPAND;

static inline __m128i two_halves(const void *low, const void *high) {
    const __m128i v = _mm_loadl_epi64((const __m128i *)low);
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(v), (const __m64 *)high));
}

// 16 weights from the packed bytes at v by 16 bits of mask; moves v on.
static inline __m128i expand16(const uint8_t *&v, uint32_t mask) {
    const __m128i control = two_halves(EXPAND.first[mask & 255], EXPAND.second[mask >> 8]);
    const uint8_t *begin = v;
    v += _mm_popcnt_u32(mask);
    return _mm_shuffle_epi8(two_halves(begin, v - 8), control);
}

// The 32 weights of 8 rows; moves v on.
static inline I expand32(const uint8_t *&v, uint32_t mask) {
    const __m128i low = expand16(v, mask & 0xffff), high = expand16(v, mask >> 16);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

template <int BITS>
struct Masked : Bytes {
    static constexpr int PAIRS = 1;
    const uint8_t *stream = nullptr;
    alignas(32) uint8_t tile[PAIR * ROWS];

    explicit Masked(const Matrix &) {}
    void row_block(const Matrix &m, int block) { stream = m.values + m.value_starts[block]; }
    void next_chunk(const Matrix &) {}
    // The packed values of pair p, one to a byte, and the end of the pair in `stream`.
    static const uint8_t *unpack(const uint64_t *mask, const uint8_t *&stream, uint8_t *room) {
        if constexpr (BITS == 8) return stream;
        int count = 0;
        for (int j = 0; j < QUADS; ++j) count += int(_mm_popcnt_u64(mask[j]));
        const __m128i eight = _mm_set1_epi8(8);
        for (int i = 0; i < count; i += 32) {
            const __m128i packed = _mm_loadu_si128((const __m128i *)(stream + i / 2));
            const __m128i low = _mm_and_si128(packed, _mm_set1_epi8(15));
            const __m128i high = _mm_and_si128(_mm_srli_epi16(packed, 4), _mm_set1_epi8(15));
            _mm_storeu_si128((__m128i *)(room + i), _mm_sub_epi8(_mm_unpacklo_epi8(low, high), eight));
            _mm_storeu_si128((__m128i *)(room + i + 16), _mm_sub_epi8(_mm_unpackhi_epi8(low, high), eight));
        }
        stream += (count + 1) / 2;
        return room;
    }
    void pair(const Matrix &m, int block, int p) {
        const uint64_t *mask = m.mask + (size_t(block) * m.pairs + p) * QUADS;
        uint8_t room[PAIR * ROWS + 64];
        const uint8_t *next = stream, *v = unpack(mask, next, room + 8);
        for (int j = 0; j < QUADS; ++j) {
            const uint64_t bits = mask[j];
            _mm256_store_si256((I *)(tile + j * 64), expand32(v, uint32_t(bits)));
            _mm256_store_si256((I *)(tile + j * 64 + 32), expand32(v, uint32_t(bits >> 32)));
        }
        stream = BITS == 8 ? v : next;
    }
    void read(const Matrix &, Weights &t, int, int half) const {
        for (int j = 0; j < QUADS; ++j) t.w[j] = load(tile + j * 64 + half * 32);
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

// ONE token keeps its sums in registers; more keep theirs in `out`, which stays in the first-level cache.
template <class Decoder, bool ONE>
static void run(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    Decoder d(m);
    const bool minima = m.minima != nullptr;
    for (int block = begin; block < end; ++block, out += x.tokens * ROWS) {
        __m256 sums[2] = {V::zero(), V::zero()};
        if (!ONE) std::memset(out, 0, size_t(x.tokens) * ROWS * sizeof(float));
        d.row_block(m, block);
        Scales scales(m, block, 0);
        int until = m.pairs_per_group, group = 0;
        for (int chunk = 0; chunk < m.pairs; chunk += Decoder::PAIRS) {
            if constexpr (ONE) prefetch(d.at, Decoder::BYTES);
#pragma GCC unroll 4
            for (int i = 0; i < Decoder::PAIRS; ++i) {
                const int p = chunk + i;
                if (p == until && group + 1 < m.groups) {
                    scales = Scales(m, block, ++group);
                    until += m.pairs_per_group;
                }
                d.pair(m, block, p);
                const size_t first = size_t(p) * x.capacity;
                const int entries = x.tokens + x.extras[p];
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    typename Decoder::Weights w;
                    d.read(m, w, i, half);
                    auto add = [&](size_t e, __m256 sum) {
                        const __m256 a = _mm256_broadcast_ss(&x.scale[e]);
                        __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(d.dot(w, x, e)), scales.scale[half]);
                        if (minima) y = _mm256_fmadd_ps(_mm256_set1_ps(float(x.sum[e])), scales.minimum[half], y);
                        return _mm256_fmadd_ps(y, a, sum);
                    };
                    if (ONE) {
                        sums[half] = add(first, sums[half]);
                        if (entries > 1) sums[half] = add(first + 1, sums[half]);
                    } else {
                        float *to = out + half * 8;
                        for (int t = 0; t < x.tokens; ++t, to += ROWS) V::store(to, add(first + t, V::load(to)));
                        for (int e = x.tokens; e < entries; ++e) {
                            to = out + size_t(x.token[first + e]) * ROWS + half * 8;
                            V::store(to, add(first + e, V::load(to)));
                        }
                    }
                }
            }
            d.next_chunk(m);
        }
        if (ONE) {
            V::store(out, sums[0]);
            V::store(out + 8, sums[1]);
        }
    }
}

// One token and a mask: weights are used as they are expanded, both halves of the rows at once.
template <int BITS>
static void run_masked(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    for (int block = begin; block < end; ++block, out += ROWS) {
        __m256 sums[2] = {V::zero(), V::zero()};
        const uint8_t *stream = m.values + m.value_starts[block];
        const uint64_t *mask = m.mask + size_t(block) * m.pairs * QUADS;
        Scales scales(m, block, 0);
        int until = m.pairs_per_group, group = 0;
        for (int p = 0; p < m.pairs; ++p, mask += QUADS) {
            if (p == until && group + 1 < m.groups) {
                scales = Scales(m, block, ++group);
                until += m.pairs_per_group;
            }
            uint8_t room[PAIR * ROWS + 64];
            const uint8_t *begun = stream;
            const uint8_t *v = Masked<BITS>::unpack(mask, stream, room + 8);
            const size_t first = size_t(p) * x.capacity;
            for (int e = 0; e < 1 + x.extras[p]; ++e) {  // the second vector of an outlier expands them again
                const int8_t *a = x.integers.data() + (first + e) * PAIR;
                const uint8_t *at = v;
                const uint64_t *masks = mask;
                asm("" : "+r"(masks));  // or the compiler takes what is the same for both entries out, and spills it
                I sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 1
                for (int j = 0; j < QUADS; ++j) {
                    const uint64_t bits = masks[j];
                    int32_t four;
                    std::memcpy(&four, a + j * LANE, 4);
                    const I signed_ = _mm256_set1_epi32(four), size = _mm256_abs_epi8(signed_);
                    const I low = _mm256_sign_epi8(expand32(at, uint32_t(bits)), signed_);
                    const I high = _mm256_sign_epi8(expand32(at, uint32_t(bits >> 32)), signed_);
                    sum[0] = _mm256_add_epi32(sum[0], widen(_mm256_maddubs_epi16(size, low)));
                    sum[1] = _mm256_add_epi32(sum[1], widen(_mm256_maddubs_epi16(size, high)));
                }
                const __m256 scale = _mm256_set1_ps(x.scale[first + e]);
                for (int half = 0; half < 2; ++half)
                    sums[half] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[half]), scales.scale[half]), scale,
                                                 sums[half]);
                if (BITS == 8) stream = begun + (at - v);
            }
        }
        V::store(out, sums[0]);
        V::store(out + 8, sums[1]);
    }
}

template <class Decoder>
static void run(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    x.tokens == 1 ? run<Decoder, true>(m, x, begin, end, out) : run<Decoder, false>(m, x, begin, end, out);
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
        return m.bits == 4 ? run<Dense4>(m, x, begin, end, out) : run<Dense8>(m, x, begin, end, out);
    if (m.kind == Kind::mask && x.tokens == 1)
        return m.bits == 4 ? run_masked<4>(m, x, begin, end, out) : run_masked<8>(m, x, begin, end, out);
    if (m.kind == Kind::mask)
        return m.bits == 4 ? run<Masked<4>, false>(m, x, begin, end, out) : run<Masked<8>, false>(m, x, begin, end, out);
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
