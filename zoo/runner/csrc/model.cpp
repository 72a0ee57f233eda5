#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "half.h"

namespace zoo {

// Tokens computed together: their activations stay in the second-level cache while weights stream past.
constexpr int TILE = 128;
// Products, gates and attentions of a layer, and those of the head.
constexpr int COUNTERS_PER_LAYER = 8;

Model::Model(const Shape &shape, int slots, int context, int threads, Cache cache, const std::string &isa)
    : shape_(shape), slots_(slots), context_(context), k_(kernels(isa.c_str())), pool_(threads), layers_(shape.layers),
      lengths_(slots), local_(threads), counters_(size_t(shape.layers) * COUNTERS_PER_LAYER + 8), counter_index_(threads) {
    const size_t rows = size_t(slots) * shape.kv_heads * context;
    const size_t data = rows * shape.head_dim * (cache == Cache::f16 ? 2 : 1), scales = cache == Cache::f16 ? 0 : rows * 4;
    const size_t each = (2 * (data + scales) + 4095) / 4096 * 4096;
    cache_ = Memory(each * shape.layers, false);
    for (int i = 0; i < shape.layers; ++i) {
        uint8_t *at = cache_.data() + each * i;
        KeyValues &kv = layers_[i].kv;
        kv.type = cache;
        kv.kv_heads = shape.kv_heads;
        kv.head_dim = shape.head_dim;
        kv.context = context;
        kv.keys = at;
        kv.values = at + data;
        kv.key_scales = reinterpret_cast<float *>(at + 2 * data);
        kv.value_scales = reinterpret_cast<float *>(at + 2 * data + scales);
    }
}

Matrix &Model::matrix(const std::string &name) {
    if (name == "embed") return embed_;
    if (name == "head") return head_;
    const size_t dot = name.rfind('.');
    if (name.rfind("layers.", 0) == 0 && dot != std::string::npos && dot > 7) {
        const int index = std::stoi(name.substr(7, dot - 7));
        if (index >= 0 && index < shape_.layers) {
            Layer &l = layers_[index];
            const std::string inner = name.substr(dot + 1);
            if (inner == "q") return l.q;
            if (inner == "k") return l.k;
            if (inner == "v") return l.v;
            if (inner == "o") return l.o;
            if (inner == "gate") return l.gate;
            if (inner == "up") return l.up;
            if (inner == "down") return l.down;
        }
    }
    throw std::invalid_argument("no matrix " + name);
}

Norm &Model::norm(const std::string &name) {
    if (name == "norm") return norm_;
    const size_t dot = name.rfind('.');
    const int index = dot > 7 && dot != std::string::npos ? std::stoi(name.substr(7, dot - 7)) : -1;
    if (index >= 0 && index < shape_.layers) {
        if (name.substr(dot + 1) == "attention_norm") return layers_[index].attention_norm;
        if (name.substr(dot + 1) == "mlp_norm") return layers_[index].mlp_norm;
    }
    throw std::invalid_argument("no norm " + name);
}

void Model::place(Span span, const uint8_t **to, size_t expected, const std::string &what) {
    if (span.size != expected) throw std::invalid_argument(what + " has the wrong size");
    placed_.push_back({span, to});
}

void Model::add_matrix(const std::string &name, Matrix m, Span values, Span scales, Span minima, Span mask, Span bias) {
    Matrix &to = matrix(name);
    to = std::move(m);
    const size_t scale_bytes = size_t(to.row_blocks) * to.groups * ROWS * 2;
    const bool masked = to.kind == Kind::mask;
    place(values, &to.values, masked ? values.size : to.bytes_per_row_block() * to.row_blocks, name + ".values");
    place(scales, reinterpret_cast<const uint8_t **>(&to.scales), scale_bytes, name + ".scales");
    if (minima.size) place(minima, reinterpret_cast<const uint8_t **>(&to.minima), scale_bytes, name + ".minima");
    if (masked) place(mask, reinterpret_cast<const uint8_t **>(&to.mask), size_t(to.row_blocks) * to.pairs * QUADS * 8, name + ".mask");
    if (bias.size) place(bias, reinterpret_cast<const uint8_t **>(&to.bias), size_t(to.rows) * 4, name + ".bias");
    if (masked) to.value_starts.assign(1, values.size);  // for check_loaded
    weight_bytes_ += values.size + scales.size + minima.size + mask.size;
    known_.push_back(name);
}

void Model::add_norm(const std::string &name, Span weight, Span bias) {
    Norm &to = norm(name);
    place(weight, reinterpret_cast<const uint8_t **>(&to.weight), size_t(shape_.hidden) * 4, name + ".weight");
    if (bias.size) place(bias, reinterpret_cast<const uint8_t **>(&to.bias), size_t(shape_.hidden) * 4, name + ".bias");
}

void Model::load(const std::string &path) {
    constexpr size_t LINE = 64;
    size_t total = 0;
    for (const Placed &p : placed_) total += (p.span.size + LINE - 1) / LINE * LINE;
    weights_ = Memory(total + 2 * LINE, true);  // kernels may read a little before the begin and beyond the end
    std::vector<Range> ranges;
    uint8_t *at = weights_.data() + LINE;
    for (const Placed &p : placed_) {
        *p.to = at;
        ranges.push_back({p.span.offset, p.span.size, at});
        at += (p.span.size + LINE - 1) / LINE * LINE;
    }
    read_ranges(path, ranges, pool_.threads());
    check_loaded();
}

static bool finite_halves(const uint16_t *x, size_t n) {
    uint16_t worst = 0;
    for (size_t i = 0; i < n; ++i) worst = std::max<uint16_t>(worst, x[i] & 0x7fff);
    return worst < 0x7c00;
}

static bool finite_floats(const float *x, size_t n) {
    for (size_t i = 0; i < n; ++i)
        if (!std::isfinite(x[i])) return false;
    return true;
}

// What sizes cannot tell: scales are numbers, and masks select as many values as there are.
void Model::check_loaded() {
    for (const std::string &name : known_) {
        Matrix &m = matrix(name);
        const size_t scales = size_t(m.row_blocks) * m.groups * ROWS;
        if (!finite_halves(m.scales, scales) || (m.minima && !finite_halves(m.minima, scales)))
            throw std::invalid_argument(name + " has a scale that is NaN or infinite");
        if (m.bias && !finite_floats(m.bias, m.rows))
            throw std::invalid_argument(name + " has a bias that is NaN or infinite");
        if (m.kind != Kind::mask) continue;
        const uint64_t size = m.value_starts[0];
        m.value_starts.assign(1, 0);
        uint64_t end = 0;
        for (int block = 0; block < m.row_blocks; ++block) {
            for (int p = 0; p < m.pairs; ++p) {
                int count = 0;
                for (int j = 0; j < QUADS; ++j)
                    count += __builtin_popcountll(m.mask[(size_t(block) * m.pairs + p) * QUADS + j]);
                end += m.bits == 8 ? count : (count + 1) / 2;
            }
            m.value_starts.push_back(end);
        }
        if (end != size) throw std::invalid_argument(name + " has a mask that does not select its values");
    }
    for (int i = 0; i <= shape_.layers; ++i) {
        const bool last = i == shape_.layers;
        const Norm *norms[] = {last ? &norm_ : &layers_[i].attention_norm, last ? &norm_ : &layers_[i].mlp_norm};
        for (const Norm *n : norms)
            if (!n->weight || !finite_floats(n->weight, shape_.hidden) || (n->bias && !finite_floats(n->bias, shape_.hidden)))
                throw std::invalid_argument("a norm is missing, NaN or infinite");
    }
    if (embed_.kind != Kind::dense) throw std::invalid_argument("embeddings must be packed dense");
}

void Model::set_rope(std::vector<float> cos, std::vector<float> sin, int positions, int half) {
    cos_ = std::move(cos);
    sin_ = std::move(sin);
    rope_half_ = half;
    rope_positions_ = positions;
}

// One row of the embedding matrix; its 16 neighbours are skipped over.
void Model::embed(int token, float *to) const {
    const Matrix &m = embed_;
    const int block = token / ROWS, row = token % ROWS;
    const uint8_t *v = m.values + block * m.bytes_per_row_block() + row * LANE;
    for (int c = 0; c < m.columns; ++c) {
        const int quad = c / LANE, group = std::min(c / PAIR / m.pairs_per_group, m.groups - 1);
        const size_t at = (size_t(block) * m.groups + group) * ROWS + row;
        const int q = m.dense_integer(v + c % LANE, quad);
        to[c] = q * half_to_float(m.scales[at]) + (m.minima ? half_to_float(m.minima[at]) : 0.0f);
    }
}

// Every thread asks for the same counters in the same order.
std::atomic<int> &Model::counter(int thread) { return counters_[counter_index_[thread]++]; }

// The rows of `from`, normalised first where `norm` is given, as 8-bit integers. A single token is quantized by
// every thread for itself, which is quicker than waiting for one another.
const Activations &Model::quantized(int thread, const float *from, int columns, int tokens, const Norm *norm) {
    Local &local = local_[thread];
    const int pairs = (columns + PAIR - 1) / PAIR;
    const int padded = (pairs + 3) / 4 * 4;  // planes read whole chunks of up to four pairs
    Activations &x = tokens == 1 ? local.x : shared_;
    if (tokens == 1 || thread == 0) x.resize(tokens, padded);
    if (tokens > 1) pool_.barrier();
    const int threads = tokens == 1 ? 1 : pool_.threads(), index = tokens == 1 ? 0 : thread;
    for (int t = tokens * index / threads; t < tokens * (index + 1) / threads; ++t) {
        const float *row = from + size_t(t) * columns;
        if (norm) {
            local.row.resize(columns);
            (shape_.rms ? k_.rms_norm : k_.layer_norm)(row, norm->weight, norm->bias, columns, shape_.norm_eps, local.row.data());
            row = local.row.data();
        }
        k_.quantize(row, columns, t, x);
    }
    if (tokens > 1) pool_.barrier();
    x.gather(padded * index / threads, padded * (index + 1) / threads);
    if (tokens > 1) pool_.barrier();
    return x;
}

// Row blocks that a thread takes at a time. Of a small matrix each takes its share at once, as a stream of memory
// pays when it is long; of a large one several pieces, so that a thread that is held up does not hold up all.
static int step_of(const Matrix &m, int threads, int tokens) {
    if (tokens > 4) return 2;  // kernels share what they load of the activations between two
    const bool large = size_t(m.rows) * m.columns > size_t(8) << 20;
    const int pieces = large ? threads * 6 : threads;
    return std::min((m.row_blocks + pieces - 1) / pieces, large ? 16 : m.row_blocks);
}

void Model::product(int thread, const Activations &x, const Matrix &m, float *to, size_t stride, bool add) {
    Local &local = local_[thread];
    std::atomic<int> &next = counter(thread);
    const int step = step_of(m, pool_.threads(), x.tokens);
    local.out.resize(std::max(local.out.size(), size_t(step) * x.tokens * ROWS));
    for (int begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < m.row_blocks;) {
        const int end = std::min(begin + step, m.row_blocks);
        k_.multiply(m, x, begin, end, local.out.data());
        const float *from = local.out.data();
        for (int block = begin; block < end; ++block) {
            const float *bias = m.bias ? m.bias + block * ROWS : nullptr;
            auto write = [&](int rows) {
                for (int t = 0; t < x.tokens; ++t, from += ROWS) {
                    float *row = to + t * stride + size_t(block) * ROWS;
                    for (int r = 0; r < rows; ++r) row[r] = (add ? row[r] : 0.0f) + from[r] + (bias ? bias[r] : 0.0f);
                }
            };
            const int rows = m.rows - block * ROWS;
            rows < ROWS ? write(rows) : write(ROWS);  // of a constant number the compiler makes vectors
        }
    }
}

// The first half of the feed-forward network: gate and up share rows, so one thread finishes them.
void Model::gated(int thread, const Activations &x, const Layer &layer) {
    Local &local = local_[thread];
    std::atomic<int> &next = counter(thread);
    const Matrix &up = layer.up;
    const int step = step_of(up, pool_.threads(), x.tokens);
    const size_t room = size_t(step) * x.tokens * ROWS;
    local.out.resize(std::max(local.out.size(), room));
    local.more.resize(std::max(local.more.size(), room));
    for (int begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < up.row_blocks;) {
        const int end = std::min(begin + step, up.row_blocks);
        const int n = (end - begin) * x.tokens * ROWS;
        auto with_bias = [&](const Matrix &m, std::vector<float> &out) {
            k_.multiply(m, x, begin, end, out.data());
            if (!m.bias) return;
            float *at = out.data();
            for (int block = begin; block < end; ++block)
                for (int t = 0; t < x.tokens; ++t, at += ROWS)
                    for (int r = 0; r < std::min(ROWS, m.rows - block * ROWS); ++r) at[r] += m.bias[block * ROWS + r];
        };
        if (shape_.gated) {
            with_bias(layer.gate, local.out);
            with_bias(up, local.more);
            k_.gate(local.out.data(), local.more.data(), n);
        } else {
            with_bias(up, local.out);
            (shape_.silu ? k_.silu : k_.gelu)(local.out.data(), n);
        }
        const float *from = local.out.data();
        for (int block = begin; block < end; ++block) {
            const int rows = std::min(ROWS, up.rows - block * ROWS);
            for (int t = 0; t < x.tokens; ++t, from += ROWS)
                std::memcpy(inner_.data() + size_t(t) * shape_.intermediate + size_t(block) * ROWS, from, rows * sizeof(float));
        }
    }
}

void Model::attention(int thread, Layer &layer) {
    const int q_size = shape_.heads * shape_.head_dim, kv_size = shape_.kv_heads * shape_.head_dim, n = shape_.head_dim;
    const size_t stride = q_size + 2 * kv_size;
    Local &local = local_[thread];
    std::atomic<int> &rotation = counter(thread);
    // Rotate queries and keys, and put keys and values where they stay.
    for (int t; (t = rotation.fetch_add(1, std::memory_order_relaxed)) < count_;) {
        float *row = qkv_.data() + t * stride;
        if (shape_.clip_qkv > 0)
            for (size_t i = 0; i < stride; ++i) row[i] = std::min(std::max(row[i], -shape_.clip_qkv), shape_.clip_qkv);
        const int position = positions_[t];
        if (rope_half_) {
            const float *cos = cos_.data() + size_t(position) * rope_half_, *sin = sin_.data() + size_t(position) * rope_half_;
            for (int h = 0; h < shape_.heads + shape_.kv_heads; ++h) k_.rotate(row + h * n, cos, sin, rope_half_);
        }
        const auto run = std::find_if(runs_.begin(), runs_.end(), [t](const Run &r) { return t < r.first + r.count; });
        for (int h = 0; h < shape_.kv_heads; ++h)
            k_.store(layer.kv, layer.kv.row(run->slot, h, position), row + q_size + h * n, row + q_size + kv_size + h * n);
    }
    pool_.barrier();
    // A piece: some tokens of one run, for one head.
    constexpr int PIECE = 16;
    std::atomic<int> &next = counter(thread);
    int pieces = 0;
    for (const Run &run : runs_) pieces += (run.count + PIECE - 1) / PIECE;
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces * shape_.heads;) {
        int piece = i / shape_.heads;
        const int head = i % shape_.heads;
        const Run *run = runs_.data();
        for (; piece >= (run->count + PIECE - 1) / PIECE; ++run) piece -= (run->count + PIECE - 1) / PIECE;
        Attention a;
        const int first = run->first + piece * PIECE;
        a.tokens = std::min(PIECE, run->first + run->count - first);
        a.q = qkv_.data() + first * stride + head * n;
        a.out = attended_.data() + size_t(first) * q_size + head * n;
        a.q_stride = stride;
        a.out_stride = q_size;
        a.slot = run->slot;
        a.kv_head = head / (shape_.heads / shape_.kv_heads);
        a.position = run->position + piece * PIECE;
        a.window = shape_.sliding_window;
        a.scale = shape_.softmax_scale;
        a.slope = slopes_.empty() ? 0.0f : slopes_[head];
        local.scores.resize(std::max(local.scores.size(), size_t(QUERIES) * (a.position + a.tokens)));
        k_.attend(layer.kv, a, local.scores.data());
    }
    pool_.barrier();
}

void Model::layer(int thread, Layer &l) {
    const int q_size = shape_.heads * shape_.head_dim, kv_size = shape_.kv_heads * shape_.head_dim;
    const size_t stride = q_size + 2 * kv_size;
    {
        const Activations &x = quantized(thread, x_.data(), shape_.hidden, count_, &l.attention_norm);
        product(thread, x, l.q, qkv_.data(), stride, false);
        product(thread, x, l.k, qkv_.data() + q_size, stride, false);
        product(thread, x, l.v, qkv_.data() + q_size + kv_size, stride, false);
        pool_.barrier();
    }
    attention(thread, l);
    {
        const Activations &x = quantized(thread, attended_.data(), q_size, count_, nullptr);
        product(thread, x, l.o, x_.data(), shape_.hidden, true);
        pool_.barrier();
    }
    {
        const Activations &x = quantized(thread, x_.data(), shape_.hidden, count_, &l.mlp_norm);
        gated(thread, x, l);
        pool_.barrier();
    }
    const Activations &x = quantized(thread, inner_.data(), shape_.intermediate, count_, nullptr);
    product(thread, x, l.down, x_.data(), shape_.hidden, true);
    pool_.barrier();
}

// One tile through all layers; x_ holds its hidden states afterwards.
void Model::tile(const int32_t *tokens, const int32_t *slots, const int32_t *positions, int count,
                 const std::function<bool()> &interrupted) {
    const size_t q_size = size_t(shape_.heads) * shape_.head_dim, kv_size = size_t(shape_.kv_heads) * shape_.head_dim;
    count_ = count;
    positions_ = positions;
    runs_.clear();
    for (int t = 0; t < count; ++t) {
        if (t && slots[t] == slots[t - 1] && positions[t] == positions[t - 1] + 1) ++runs_.back().count;
        else runs_.push_back({t, 1, slots[t], positions[t]});
    }
    auto room = [](std::vector<float> &v, size_t n) { if (v.size() < n) v.resize(n); };
    room(x_, count * size_t(shape_.hidden));
    room(qkv_, count * (q_size + 2 * kv_size));
    room(attended_, count * q_size);
    room(inner_, count * size_t(shape_.intermediate));
    for (int t = 0; t < count; ++t) embed(tokens[t], x_.data() + size_t(t) * shape_.hidden);
    for (auto &c : counters_) c.store(0, std::memory_order_relaxed);
    std::fill(counter_index_.begin(), counter_index_.end(), 0);
    // A tile of many tokens takes long enough to ask between layers; one token does not.
    const int together = count > 8 ? 1 : shape_.layers;
    for (int begin = 0; begin < shape_.layers; begin += together) {
        pool_.run([&](int thread) {
            for (int i = begin; i < std::min(begin + together, shape_.layers); ++i) layer(thread, layers_[i]);
        });
        if (count > 8 && interrupted()) throw Interrupted();
    }
}

// Logits after rows `rows` of x_.
void Model::head(const std::vector<int> &rows, float *logits) {
    const int n = int(rows.size());
    std::vector<float> &gathered = attended_;
    const size_t room = size_t(n) * shape_.hidden;
    if (gathered.size() < room) gathered.resize(room);
    for (int i = 0; i < n; ++i)
        std::memcpy(gathered.data() + size_t(i) * shape_.hidden, x_.data() + size_t(rows[i]) * shape_.hidden,
                    shape_.hidden * sizeof(float));
    counters_[0] = 0;
    std::fill(counter_index_.begin(), counter_index_.end(), 0);
    pool_.run([&](int thread) {
        const Activations &x = quantized(thread, gathered.data(), shape_.hidden, n, &norm_);
        product(thread, x, shape_.tied ? embed_ : head_, logits, shape_.vocabulary, false);
    });
    if (shape_.logit_scale != 1)
        for (size_t i = 0; i < size_t(n) * shape_.vocabulary; ++i) logits[i] *= shape_.logit_scale;
}

void Model::forward(const int32_t *tokens, const int32_t *slots, const int32_t *positions, int count, const int32_t *wanted,
                    int wanted_count, float *logits, const std::function<bool()> &interrupted) {
    std::lock_guard<std::mutex> one_call(busy_);
    std::vector<int> lengths = lengths_;
    for (int t = 0; t < count; ++t) {
        auto fail = [&](const char *what, int value) {
            throw std::out_of_range("token " + std::to_string(t) + " of the call: " + what + " " + std::to_string(value));
        };
        if (tokens[t] < 0 || tokens[t] >= shape_.vocabulary) fail("no token has the id", tokens[t]);
        if (slots[t] < 0 || slots[t] >= slots_) fail("there is no slot", slots[t]);
        if (positions[t] < 0 || positions[t] >= context_) fail("beyond the context is position", positions[t]);
        if (positions[t] > lengths[slots[t]]) fail("nothing is held yet before position", positions[t]);
        if (rope_half_ && positions[t] >= rope_positions_) fail("no rotation is known for position", positions[t]);
        lengths[slots[t]] = positions[t] + 1;
    }
    for (int i = 0; i < wanted_count; ++i)
        if (wanted[i] < 0 || wanted[i] >= count || (i && wanted[i] <= wanted[i - 1]))
            throw std::out_of_range("logits are wanted of tokens that do not ascend within the call");
    int next = 0;
    for (int begin = 0; begin < count; begin += TILE) {
        const int size = std::min(TILE, count - begin);
        tile(tokens + begin, slots + begin, positions + begin, size, interrupted);
        std::vector<int> rows;
        for (; next < wanted_count && wanted[next] < begin + size; ++next) rows.push_back(wanted[next] - begin);
        if (rows.empty()) continue;
        head(rows, logits);
        logits += rows.size() * size_t(shape_.vocabulary);
    }
    lengths_ = lengths;
}

}  // namespace zoo
