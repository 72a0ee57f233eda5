// Everything but the matrix product, once, over a vector type V of the including file: V::N floats in V::F.
// Included inside a namespace of each instruction set's file.

static inline float sum_of(const float *x, int n) {
    typename V::F a = V::zero();
    int i = 0;
    for (; i + V::N <= n; i += V::N) a = V::add(a, V::load(x + i));
    float s = V::sum(a);
    for (; i < n; ++i) s += x[i];
    return s;
}

static inline float sum_of_squares(const float *x, int n, float mean) {
    const auto m = V::set(mean);
    typename V::F a = V::zero();
    int i = 0;
    for (; i + V::N <= n; i += V::N) {
        const auto d = V::sub(V::load(x + i), m);
        a = V::fma(d, d, a);
    }
    float s = V::sum(a);
    for (; i < n; ++i) s += (x[i] - mean) * (x[i] - mean);
    return s;
}

static void scale_and_shift(const float *x, const float *weight, const float *bias, int n, float mean, float factor,
                            float *out) {
    for (int i = 0; i < n; ++i) out[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0.0f);
}

static void rms_norm(const float *x, const float *weight, const float *bias, int n, float eps, float *out) {
    scale_and_shift(x, weight, bias, n, 0, 1.0f / std::sqrt(sum_of_squares(x, n, 0) / n + eps), out);
}

static void layer_norm(const float *x, const float *weight, const float *bias, int n, float eps, float *out) {
    const float mean = sum_of(x, n) / n;
    scale_and_shift(x, weight, bias, n, mean, 1.0f / std::sqrt(sum_of_squares(x, n, mean) / n + eps), out);
}

// exp by 2^n * 2^f, |f| <= 1/2, the latter by its Taylor series to the sixth power: 1e-7 relative.
static inline typename V::F exp_of(typename V::F x) {
    x = V::min(V::max(x, V::set(-87.0f)), V::set(88.0f));
    const auto y = V::mul(x, V::set(1.44269504f));
    const auto n = V::round(y);
    // ln 2 in two parts, the first exact in few bits
    auto f = V::fma(n, V::set(-0.693145752f), x);
    f = V::fma(n, V::set(-1.42860677e-6f), f);
    auto p = V::set(1.0f / 720);
    p = V::fma(p, f, V::set(1.0f / 120));
    p = V::fma(p, f, V::set(1.0f / 24));
    p = V::fma(p, f, V::set(1.0f / 6));
    p = V::fma(p, f, V::set(0.5f));
    p = V::fma(p, f, V::set(1.0f));
    p = V::fma(p, f, V::set(1.0f));
    return V::scale2(p, n);
}

// Apply a function of vectors to the whole of x; the rest that fills no vector goes through a buffer.
template <class Function>
static inline void map(float *x, const float *other, int n, Function function) {
    int i = 0;
    for (; i + V::N <= n; i += V::N) V::store(x + i, function(V::load(x + i), other ? V::load(other + i) : V::zero()));
    if (i < n) {
        float a[V::N] = {}, b[V::N] = {};
        std::memcpy(a, x + i, (n - i) * sizeof(float));
        if (other) std::memcpy(b, other + i, (n - i) * sizeof(float));
        V::store(a, function(V::load(a), V::load(b)));
        std::memcpy(x + i, a, (n - i) * sizeof(float));
    }
}

static inline typename V::F sigmoid(typename V::F x) {
    return V::div(V::set(1.0f), V::add(V::set(1.0f), exp_of(V::sub(V::zero(), x))));
}

static void gate(float *x, const float *up, int n) {
    map(x, up, n, [](typename V::F a, typename V::F b) { return V::mul(V::mul(a, sigmoid(a)), b); });
}

static void silu(float *x, int n) {
    map(x, nullptr, n, [](typename V::F a, typename V::F) { return V::mul(a, sigmoid(a)); });
}

// x (1 + erf(x / sqrt 2)) / 2, erf by Abramowitz and Stegun 7.1.26 (1.5e-7 absolute).
static void gelu(float *x, int n) {
    map(x, nullptr, n, [](typename V::F a, typename V::F) {
        const auto z = V::mul(V::abs(a), V::set(0.70710678f));
        const auto t = V::div(V::set(1.0f), V::fma(V::set(0.3275911f), z, V::set(1.0f)));
        auto p = V::set(1.061405429f);
        p = V::fma(p, t, V::set(-1.453152027f));
        p = V::fma(p, t, V::set(1.421413741f));
        p = V::fma(p, t, V::set(-0.284496736f));
        p = V::fma(p, t, V::set(0.254829592f));
        // 1 - erf(z): phi(-|x|) = half of it
        const auto tail = V::mul(V::mul(V::mul(p, t), exp_of(V::sub(V::zero(), V::mul(z, z)))), V::set(0.5f));
        // x >= 0: x - x tail; x < 0: x tail = -|x| tail
        return V::sub(V::max(a, V::zero()), V::mul(V::abs(a), tail));
    });
}

// rotate_half: (a, b) -> (a cos - b sin, b cos + a sin) with a the first half of the head and b the second.
static void rotate(float *x, const float *cos, const float *sin, int half) {
    float *y = x + half;
    for (int i = 0; i < half; ++i) {
        const float a = x[i], b = y[i];
        x[i] = a * cos[i] - b * sin[i];
        y[i] = b * cos[i] + a * sin[i];
    }
}

static inline float largest_of(const float *x, int n) {
    typename V::F a = V::zero();
    int i = 0;
    for (; i + V::N <= n; i += V::N) a = V::max(a, V::abs(V::load(x + i)));
    float m = V::largest(a);
    for (; i < n; ++i) m = std::max(m, std::fabs(x[i]));
    return m;
}

// The nearest integers of x * factor, |x * factor| < 2^22: adding 1.5 * 2^23 leaves them in the lowest bits.
// Unsigned: what NaN or infinity leaves may wrap; the logits tell of it.
static inline void nearest(const float *x, float factor, int n, uint32_t *to) {
    for (int i = 0; i < n; ++i) {
        const float shifted = x[i] * factor + 12582912.0f;
        std::memcpy(to + i, &shifted, 4);
        to[i] -= 0x4b400000u;
    }
}

static inline void round_to_entry(float *x, float scale, size_t entry, Activations &out) {
    uint32_t q[PAIR];
    int32_t sum = 0;
    nearest(x, scale > 0 ? 1 / scale : 0, PAIR, q);
    int8_t *integers = out.integers.data() + entry * PAIR;
    uint8_t *biased = out.biased.data() + entry * PAIR;
    for (int i = 0; i < PAIR; ++i) integers[i] = int8_t(q[i]);
    for (int i = 0; i < PAIR; ++i) biased[i] = uint8_t(q[i] + 128);
    for (int i = 0; i < PAIR; ++i) sum += integers[i];
    for (int i = 0; i < PAIR; ++i) x[i] -= float(int32_t(q[i])) * scale;
    out.scale[entry] = scale;
    out.sum[entry] = sum;
}

static void quantize(const float *x, int columns, int t, Activations &out) {
    const float outlier = OUTLIER * std::sqrt(sum_of_squares(x, columns, 0) / columns);
    for (int p = 0; p < out.pairs; ++p) {
        float own[PAIR] = {};
        const int here = std::min(std::max(columns - p * PAIR, 0), PAIR);
        if (here == PAIR) std::memcpy(own, x + p * PAIR, sizeof own);
        else if (here > 0) std::memcpy(own, x + p * PAIR, here * sizeof(float));
        const float largest = largest_of(own, PAIR);
        const size_t entry = size_t(p) * out.capacity + t;
        const float scale = largest / 127;
        round_to_entry(own, scale, entry, out);
        out.token[entry] = t;
        const bool extra = largest > outlier;
        out.has_extra[size_t(t) * out.pairs + p] = extra;
        if (extra) {
            round_to_entry(own, scale / 254, entry + out.tokens, out);
            out.token[entry + out.tokens] = t;
        }
    }
}

static void store(const KeyValues &kv, size_t row, const float *k, const float *v) {
    const int n = kv.head_dim;
    if (kv.type == Cache::f16) {
        V::to_half(k, static_cast<uint16_t *>(kv.keys) + row * n, n);
        V::to_half(v, static_cast<uint16_t *>(kv.values) + row * n, n);
        return;
    }
    auto round = [n](const float *x, int8_t *to, float &scale) {
        scale = largest_of(x, n) / 127;
        uint32_t q[PAIR];
        for (int i = 0; i < n; i += PAIR) {
            const int some = std::min(n - i, PAIR);
            nearest(x + i, scale > 0 ? 1 / scale : 0, some, q);
            for (int j = 0; j < some; ++j) to[i + j] = int8_t(q[j]);
        }
    };
    round(k, static_cast<int8_t *>(kv.keys) + row * n, kv.key_scales[row]);
    round(v, static_cast<int8_t *>(kv.values) + row * n, kv.value_scales[row]);
}

// Scores of `Q` queries with one key. Keys are read once for all of them.
template <int Q, class Element>
static inline void scores_of(const float *const *q, const Element *key, int n, float *out) {
    typename V::F a[Q];
    for (int j = 0; j < Q; ++j) a[j] = V::zero();
    int i = 0;
    for (; i + V::N <= n; i += V::N) {
        const auto k = V::load(key + i);
        for (int j = 0; j < Q; ++j) a[j] = V::fma(k, V::load(q[j] + i), a[j]);
    }
    int j = 0;
    for (; j + 4 <= Q; j += 4) V::sums(a + j, out + j);
    for (; j < Q; ++j) out[j] = V::sum(a[j]);
    for (; i < n; ++i)
        for (j = 0; j < Q; ++j) out[j] += q[j][i] * V::one(key + i);
}

// The weighted sum of the values, times `inverse`, from column c on, R vectors at a time so that the sums stay in registers.
// Returns the first column that is left.
template <int Q, int R, class Element>
static inline int sum_values(const Attention &a, const Element *values, const float *weights, const float *inverse, int count,
                             int n, int c, float *out) {
    for (; c + R * V::N <= n; c += R * V::N) {
        typename V::F sums[Q][R];
        for (int j = 0; j < Q; ++j)
            for (int r = 0; r < R; ++r) sums[j][r] = V::zero();
        const Element *value = values + c;
        for (int i = 0; i < count; ++i, value += n) {
            for (int r = 0; r < R; ++r) {
                const auto v = V::load(value + r * V::N);
                for (int j = 0; j < Q; ++j) sums[j][r] = V::fma(V::set(weights[size_t(j) * count + i]), v, sums[j][r]);
            }
        }
        for (int j = 0; j < Q; ++j)
            for (int r = 0; r < R; ++r) V::store(out + j * a.out_stride + c + r * V::N, V::mul(sums[j][r], V::set(inverse[j])));
    }
    return c;
}

static inline float largest(const float *x, int n) {
    float m = x[0];
    int i = 0;
    if (n >= V::N) {
        auto a = V::load(x);
        for (i = V::N; i + V::N <= n; i += V::N) a = V::max(a, V::load(x + i));
        float lanes[V::N];
        V::store(lanes, a);
        for (float lane : lanes) m = std::max(m, lane);
    }
    for (; i < n; ++i) m = std::max(m, x[i]);
    return m;
}

// Attention of Q consecutive tokens of one head: softmax(scale q . k + bias) v over the positions each sees.
template <int Q, class Element>
static void attend_block(const KeyValues &kv, const Attention &a, const float *q0, float *out, int position, float *scores) {
    const int n = kv.head_dim, last = position + Q - 1;
    const int first = a.window ? std::max(0, position - a.window + 1) : 0;
    const int count = last - first + 1;
    const size_t row = kv.row(a.slot, a.kv_head, first);
    const Element *keys = static_cast<const Element *>(kv.keys) + row * n;
    const Element *values = static_cast<const Element *>(kv.values) + row * n;
    const bool scaled = kv.type == Cache::int8;
    const float *q[Q];
    for (int j = 0; j < Q; ++j) q[j] = q0 + j * a.q_stride;
    for (int i = 0; i < count; ++i) {
        float s[Q];
        scores_of<Q>(q, keys + size_t(i) * n, n, s);
        const float scale = scaled ? a.scale * kv.key_scales[row + i] : a.scale;
        for (int j = 0; j < Q; ++j) scores[size_t(j) * count + i] = s[j] * scale + a.slope * (first + i - position - j);
    }
    float inverse[Q];
    for (int j = 0; j < Q; ++j) {
        float *p = scores + size_t(j) * count;
        const int begin = a.window ? std::max(0, position + j - a.window + 1) - first : 0;
        const int end = position + j - first + 1;
        const auto top = V::set(largest(p + begin, end - begin));
        map(p + begin, nullptr, end - begin, [top](typename V::F x, typename V::F) { return exp_of(V::sub(x, top)); });
        inverse[j] = 1 / sum_of(p + begin, end - begin);
        for (int i = 0; i < begin; ++i) p[i] = 0;
        for (int i = end; i < count; ++i) p[i] = 0;
        if (scaled)
            for (int i = begin; i < end; ++i) p[i] *= kv.value_scales[row + i];
    }
    int c = sum_values<Q, Q == 1 ? 8 : 2>(a, values, scores, inverse, count, n, 0, out);
    c = sum_values<Q, Q == 1 ? 4 : 1>(a, values, scores, inverse, count, n, c, out);
    c = sum_values<Q, 1>(a, values, scores, inverse, count, n, c, out);
    for (; c < n; ++c) {
        for (int j = 0; j < Q; ++j) {
            float s = 0;
            for (int i = 0; i < count; ++i) s += scores[size_t(j) * count + i] * V::one(values + size_t(i) * n + c);
            out[j * a.out_stride + c] = s * inverse[j];
        }
    }
}

template <class Element>
static void attend_all(const KeyValues &kv, const Attention &a, float *scores) {
    constexpr int Q = V::N < 16 ? 4 : QUERIES;  // as many as there are registers for
    int t = 0;
    for (; t + Q <= a.tokens; t += Q)
        attend_block<Q, Element>(kv, a, a.q + t * a.q_stride, a.out + t * a.out_stride, a.position + t, scores);
    for (; t < a.tokens; ++t)
        attend_block<1, Element>(kv, a, a.q + t * a.q_stride, a.out + t * a.out_stride, a.position + t, scores);
}

static void attend(const KeyValues &kv, const Attention &a, float *scores) {
    if (kv.type == Cache::f16) attend_all<uint16_t>(kv, a, scores);
    else attend_all<int8_t>(kv, a, scores);
}
