// NEON with the dot-product extension: 4 rows x 4 bytes to a vector, products by sdot.
//
// sdot multiplies signed bytes and adds four neighbours in 32 bits, so gathered activations go in as they are and
// nothing has to be taken off again. The 64 bytes of 16 rows are four vectors, called quarters here.

#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "kernels.h"

namespace zoo {
namespace neon {

struct V {
    using F = float32x4_t;
    static constexpr int N = 4;
    static F zero() { return vdupq_n_f32(0); }
    static F set(float x) { return vdupq_n_f32(x); }
    static F load(const float *x) { return vld1q_f32(x); }
    static F load(const uint16_t *x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
    static F load(const int8_t *x) {
        uint32_t four;
        std::memcpy(&four, x, 4);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
    }
    static float one(const uint16_t *x) { return half_to_float(*x); }
    static float one(const int8_t *x) { return *x; }
    static void store(float *to, F x) { vst1q_f32(to, x); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F min(F a, F b) { return vminq_f32(a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static F abs(F a) { return vabsq_f32(a); }
    static F round(F a) { return vrndnq_f32(a); }
    static F scale2(F p, F n) {
        return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
    }
    static float sum(F a) { return vaddvq_f32(a); }
    static void sums(const F *a, float *to) {  // of four vectors
        store(to, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
    }
    static float largest(F a) { return vmaxvq_f32(a); }
    static void to_half(const float *x, uint16_t *to, int n) {
        int i = 0;
        for (; i + 4 <= n; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(load(x + i))));
        for (; i < n; ++i) to[i] = float_to_half(x[i]);
    }
};

#include "ops.inl"

using I = int8x16_t;
using U = uint8x16_t;  // GCC and Clang know the operators of vectors

static inline U load(const uint8_t *p, int quarter) { return vld1q_u8(p + quarter * 16); }
static inline U field(U v, int shift, int bits) {
    return v >> vdupq_n_u8(uint8_t(shift)) & vdupq_n_u8(uint8_t((1 << bits) - 1));
}
static inline I as_signed(U v) { return vreinterpretq_s8_u8(v); }
static inline I flip(U v) { return as_signed(v ^ vdupq_n_u8(128)); }

// The four weights of a quad of a banded pair lie in its first block, in its second, or, where that holds neither
// a whole number of quads (K = 6, 10), two in each; the last look their activations up in both blocks at once.
template <int K>
struct Gathered {
    static constexpr int Q = K / 2;
    static constexpr bool in_first(int j) { return 4 * j + 3 < K; }
    static constexpr bool in_second(int j) { return 4 * j >= K; }

    struct Weights {
        U index[Q];
        I w[Q];
    };
    U start[Q];

    explicit Gathered(const Matrix &m) {
        for (int j = 0; j < Q; ++j) {
            uint8_t a[16];
            for (int i = 0; i < 16; ++i) {
                const int s = 4 * j + i % 4;
                a[i] = uint8_t(m.window_starts[s % K] + (in_second(j) ? 0 : s / K * BLOCK));
            }
            start[j] = vld1q_u8(a);
        }
    }

    int32x4_t dot(const Weights &t, const Activations &x, size_t e) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        const int8x16x2_t blocks = {{vld1q_s8(a), vld1q_s8(a + BLOCK)}};
        int32x4_t sum = vdupq_n_s32(0);
        for (int j = 0; j < Q; ++j) {
            const I g = in_first(j)    ? vqtbl1q_s8(blocks.val[0], t.index[j])
                        : in_second(j) ? vqtbl1q_s8(blocks.val[1], t.index[j])
                                       : vqtbl2q_s8(blocks, t.index[j]);
            sum = vdotq_s32(sum, t.w[j], g);
        }
        return sum;
    }
};

template <int K, int OFF>
struct Banded : Gathered<K> {
    static constexpr int PAIRS = 1;
    using Base = Gathered<K>;
    using typename Base::Weights;
    const uint8_t *at = nullptr;

    explicit Banded(const Matrix &m) : Base(m) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk() { at += Base::Q * 64; }
    void read(Weights &t, int, int quarter) const {
        for (int j = 0; j < Base::Q; ++j) {
            const U v = load(at + j * 64, quarter);
            t.index[j] = field(v, 0, OFF) + this->start[j];
            t.w[j] = flip(v) >> vdupq_n_s8(OFF);  // an offset of half the range is a sign the other way round
        }
    }
};

template <int K, int WBITS, int OFF>
struct Planes : Gathered<K> {
    using Base = Gathered<K>;
    using typename Base::Weights;
    static constexpr int PER = 8 / OFF;  // quads of offsets in a vector
    static constexpr int PAIRS = Base::Q % PER == 0 ? 1 : 2 * Base::Q % PER == 0 ? 2 : 4;
    static constexpr int CHUNK = PAIRS * Base::Q * 8 * (WBITS + OFF);
    const uint8_t *at = nullptr;

    explicit Planes(const Matrix &m) : Base(m) {}
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk() { at += CHUNK; }
    void read(Weights &t, int in_chunk, int quarter) const {
        const uint8_t *weights = at + PAIRS * Base::Q * 8 * OFF;
        for (int j = 0; j < Base::Q; ++j) {
            const int quad = in_chunk * Base::Q + j;
            t.index[j] = field(load(at + quad / PER * 64, quarter), quad % PER * OFF, OFF) + this->start[j];
            t.w[j] = WBITS == 8 ? flip(load(weights + quad * 64, quarter))
                                : as_signed(field(load(weights + quad / 2 * 64, quarter), quad % 2 * 4, 4) - vdupq_n_u8(8));
        }
    }
};

// All four columns of a lane are stored: every row of a quad meets the same four activations, one lane of theirs.
struct Whole {
    static constexpr int PAIRS = 1;
    struct Weights {
        I w[QUADS];
    };
    int offset = 0;  // of weights without a sign, taken off the sum

    int32x4_t dot(const Weights &t, const Activations &x, size_t e) const {
        const int8_t *a = x.integers.data() + e * PAIR;
        const I first = vld1q_s8(a), second = vld1q_s8(a + 16);
        int32x4_t sum = vdupq_n_s32(-offset * x.sum[e]);
        sum = vdotq_laneq_s32(sum, t.w[0], first, 0);
        sum = vdotq_laneq_s32(sum, t.w[1], first, 1);
        sum = vdotq_laneq_s32(sum, t.w[2], first, 2);
        sum = vdotq_laneq_s32(sum, t.w[3], first, 3);
        sum = vdotq_laneq_s32(sum, t.w[4], second, 0);
        sum = vdotq_laneq_s32(sum, t.w[5], second, 1);
        sum = vdotq_laneq_s32(sum, t.w[6], second, 2);
        return vdotq_laneq_s32(sum, t.w[7], second, 3);
    }
};

template <int BITS>
struct Dense : Whole {
    const uint8_t *at = nullptr;

    explicit Dense(const Matrix &m) { offset = BITS == 8 ? 0 : m.offset(); }
    void row_block(const Matrix &m, int block) { at = m.values + size_t(block) * m.bytes_per_row_block(); }
    void pair(const Matrix &, int, int) {}
    void next_chunk() { at += 64 * BITS; }
    void read(Weights &t, int, int quarter) const {
        for (int j = 0; j < QUADS; ++j) t.w[j] = as_signed(quad(j, quarter));
    }
    U quad(int j, int quarter) const {
        if (BITS == 8) return load(at + j * 64, quarter);
        if (BITS == 4) return field(load(at + j / 2 * 64, quarter), j % 2 * 4, 4);
        const uint8_t *three = at + j / 4 * 192;  // of four vectors of 6 bits the last lies in the two highest bits of the others
        if (j % 4 < 3) return field(load(three + j % 4 * 64, quarter), 0, 6);
        return field(load(three, quarter), 6, 2) | field(load(three + 64, quarter), 6, 2) << vdupq_n_u8(2) |
               field(load(three + 128, quarter), 6, 2) << vdupq_n_u8(4);
    }
};

// Where the packed bytes of 8 weights go, per byte of the mask; beyond the table there are zeros.
struct ExpandTable {
    alignas(64) uint8_t from[256][8];
    constexpr ExpandTable() : from() {
        for (int mask = 0; mask < 256; ++mask)
            for (int bit = 0, next = 0; bit < 8; ++bit) from[mask][bit] = mask >> bit & 1 ? uint8_t(next++) : 0x80;
    }
};
constexpr ExpandTable EXPAND;

static inline int8x8_t expand8(const int8_t *v, uint64_t mask) {
    return vqtbl1_s8(vld1q_s8(v), vld1_u8(EXPAND.from[mask & 255]));
}

template <int BITS>
struct Masked : Whole {
    const uint8_t *stream = nullptr;
    int8_t unpacked[PAIR * ROWS + 64];
    const uint64_t *mask = nullptr;  // of the pair
    const int8_t *begin[QUADS];      // where the values of each quad begin
    uint64_t ends[QUADS];            // byte i: how many values the bytes of its mask up to the i-th select

    explicit Masked(const Matrix &) {}
    void row_block(const Matrix &m, int block) { stream = m.values + m.value_starts[block]; }
    void next_chunk() {}
    void pair(const Matrix &m, int block, int p) {
        mask = m.mask + (size_t(block) * m.pairs + p) * QUADS;
        int count = 0;
        for (int j = 0; j < QUADS; ++j) {
            begin[j] = (BITS == 8 ? reinterpret_cast<const int8_t *>(stream) : unpacked) + count;
            const uint8x8_t counts = vcnt_u8(vcreate_u8(mask[j]));
            ends[j] = vget_lane_u64(vreinterpret_u64_u8(counts), 0) * 0x0101010101010101;  // sums them up, byte by byte
            count += int(ends[j] >> 56);
        }
        for (int i = 0; BITS == 4 && i < count; i += 32) {
            const U v = vld1q_u8(stream + i / 2), low = field(v, 0, 4), high = field(v, 4, 4), eight = vdupq_n_u8(8);
            vst1q_s8(unpacked + i, as_signed(vzip1q_u8(low, high) - eight));
            vst1q_s8(unpacked + i + 16, as_signed(vzip2q_u8(low, high) - eight));
        }
        stream += BITS == 8 ? count : (count + 1) / 2;
    }
    void read(Weights &t, int, int quarter) const {
        for (int j = 0; j < QUADS; ++j) {
            const uint64_t bits = mask[j] >> quarter * 16;
            const uint64_t low = (ends[j] << 8) >> quarter * 16 & 255, high = ends[j] >> quarter * 16 & 255;
            t.w[j] = vcombine_s8(expand8(begin[j] + low, bits), expand8(begin[j] + high, bits >> 8));
        }
    }
};

struct Scales {
    float32x4_t scale[4], minimum[4];
    Scales(const Matrix &m, int block, int group) {
        const size_t at = (size_t(block) * m.groups + group) * ROWS;
        for (int quarter = 0; quarter < 4; ++quarter) {
            scale[quarter] = V::load(m.scales + at + quarter * 4);
            minimum[quarter] = m.minima ? V::load(m.minima + at + quarter * 4) : V::zero();
        }
    }
};

// ONE token keeps its sums in registers; more keep theirs in `out`, which stays in the first-level cache.
template <class Decoder, bool ONE>
static void run(const Matrix &m, const Activations &x, int begin, int end, float *out) {
    Decoder d(m);
    const bool minima = std::is_same_v<Decoder, Dense<4>> && m.minima;  // no other layout has them
    for (int block = begin; block < end; ++block, out += x.tokens * ROWS) {
        float32x4_t sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        if (!ONE) std::memset(out, 0, size_t(x.tokens) * ROWS * sizeof(float));
        d.row_block(m, block);
        Scales scales(m, block, 0);
        int until = m.pairs_per_group, group = 0;
        for (int chunk = 0; chunk < m.pairs; chunk += Decoder::PAIRS) {
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
                for (int quarter = 0; quarter < 4; quarter += 2) {  // two share the loads of the activations
                    typename Decoder::Weights w[2];
                    d.read(w[0], i, quarter);
                    d.read(w[1], i, quarter + 1);
                    auto add = [&](size_t e, float32x4_t *sum) {
                        for (int j = 0; j < 2; ++j) {
                            float32x4_t y = vmulq_f32(vcvtq_f32_s32(d.dot(w[j], x, e)), scales.scale[quarter + j]);
                            if (minima) y = vfmaq_n_f32(y, scales.minimum[quarter + j], float(x.sum[e]));
                            sum[j] = vfmaq_n_f32(sum[j], y, x.scale[e]);
                        }
                    };
                    if (ONE) {
                        add(first, sums + quarter);
                        if (entries > 1) add(first + 1, sums + quarter);
                        continue;
                    }
                    for (int e = 0; e < entries; ++e) {
                        const int t = e < x.tokens ? e : x.token[first + e];
                        float *to = out + size_t(t) * ROWS + quarter * 4;
                        float32x4_t sum[2] = {V::load(to), V::load(to + 4)};
                        add(first + e, sum);
                        V::store(to, sum[0]);
                        V::store(to + 4, sum[1]);
                    }
                }
            }
            d.next_chunk();
        }
        for (int quarter = 0; ONE && quarter < 4; ++quarter) V::store(out + quarter * 4, sums[quarter]);
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
        return m.bits == 4   ? run<Dense<4>>(m, x, begin, end, out)
               : m.bits == 6 ? run<Dense<6>>(m, x, begin, end, out)
                             : run<Dense<8>>(m, x, begin, end, out);
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

}  // namespace neon

const Kernels neon_kernels = {
    "neon",     neon::multiply, neon::quantize, neon::rms_norm, neon::layer_norm, neon::gate,
    neon::silu, neon::gelu,     neon::rotate,   neon::store,    neon::attend,
};

}  // namespace zoo
