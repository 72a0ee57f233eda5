// The engine: a transformer decoder over packed matrices.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace zoo {

struct Shape {
    int vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim;
    bool rms, silu, gated, tied;
    float norm_eps, softmax_scale, logit_scale;
    int sliding_window;  // 0: none
    float clip_qkv;      // 0: none
};

struct Norm {
    const float *weight = nullptr, *bias = nullptr;
};

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    Norm attention_norm, mlp_norm;
    KeyValues kv;
};

// Where one tensor lies in the file; size 0: not there.
struct Span {
    uint64_t offset = 0, size = 0;
};

class Model {
  public:
    Model(const Shape &shape, int slots, int context, int threads, Cache cache, const std::string &isa);

    // Describe the file's contents, then load it.
    void add_matrix(const std::string &name, Matrix matrix, Span values, Span scales, Span minima, Span mask, Span bias);
    void add_norm(const std::string &name, Span weight, Span bias);
    void load(const std::string &path);

    void set_rope(std::vector<float> cos, std::vector<float> sin, int positions, int half);
    void set_slopes(std::vector<float> slopes) { slopes_ = std::move(slopes); }

    // See zoo/runner/engine.py. `interrupted` is asked now and then; true ends the call by Interrupted.
    void forward(const int32_t *tokens, const int32_t *slots, const int32_t *positions, int count, const int32_t *wanted,
                 int wanted_count, float *logits, const std::function<bool()> &interrupted);

    struct Interrupted {};
    const Shape &shape() const { return shape_; }
    size_t weight_bytes() const { return weight_bytes_; }
    const char *isa() const { return k_.name; }

  private:
    struct Placed {
        Span span;
        const uint8_t **to;
    };
    struct Run {  // consecutive tokens of one slot
        int first, count, slot, position;
    };
    struct Local {  // of one thread
        std::vector<float> out, more, row, scores;
        Activations x;
    };

    Matrix &matrix(const std::string &name);
    Norm &norm(const std::string &name);
    void place(Span span, const uint8_t **to, size_t expected, const std::string &what);
    void check_loaded();
    void embed(int token, float *to) const;
    void tile(const int32_t *tokens, const int32_t *slots, const int32_t *positions, int count,
              const std::function<bool()> &interrupted);
    void layer(int thread, Layer &layer);
    void head(const std::vector<int> &rows, float *logits);
    const Activations &quantized(int thread, const float *from, int columns, int tokens, const Norm *norm);
    void product(int thread, const Activations &x, const Matrix &m, float *to, size_t stride, bool add);
    void gated(int thread, const Activations &x, const Layer &layer);
    void attention(int thread, Layer &layer);
    std::atomic<int> &counter(int thread);

    Shape shape_;
    int slots_, context_;
    const Kernels &k_;
    Pool pool_;
    Matrix embed_, head_;
    Norm norm_;
    std::vector<Layer> layers_;
    std::vector<Placed> placed_;
    std::vector<std::string> known_;
    Memory weights_, cache_;
    size_t weight_bytes_ = 0;
    std::vector<float> cos_, sin_, slopes_;
    int rope_half_ = 0, rope_positions_ = 0;
    std::vector<int> lengths_;  // positions held, per slot

    std::mutex busy_;  // one call at a time
    // Of the tile that is being computed.
    int count_ = 0;
    const int32_t *positions_ = nullptr;
    std::vector<Run> runs_;
    std::vector<float> x_, qkv_, attended_, inner_;
    Activations shared_;
    std::vector<Local> local_;
    std::vector<std::atomic<int>> counters_;
    std::vector<int> counter_index_;  // per thread: how many it has used
};

}  // namespace zoo
