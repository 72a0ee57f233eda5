// Checks one table of kernels against float64:
//
//     check_kernels avx2            every layout and function of one table; one line per failure, status 1 if any
//     check_kernels broken          the scalar table with a small error in each function, all of which must be found
//     check_kernels matrices FILE   writes packed matrices and their integers, for another reader to compare
//
// Status 77: this processor cannot run that table. Matrices are packed here, slot by slot, as the docstring of
// zoo/runner/format.py says, and share no code with the kernels; tests/test_kernels.py lets format.py read them.

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

using namespace zoo;

// ---- Failures ----------------------------------------------------------------------------------------------------

static std::map<std::string, int> failures;  // by function
static long checks = 0;

__attribute__((format(printf, 3, 4))) static void check(bool good, const char *function, const char *format, ...) {
    ++checks;
    if (good || ++failures[function] > 5) return;  // five of a kind are enough to read
    std::printf("FAIL %s: ", function);
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
}

// NaN is near to nothing.
static bool near(double found, double expected, double tolerance) { return std::fabs(found - expected) <= tolerance; }

// ---- Numbers -----------------------------------------------------------------------------------------------------

static std::mt19937 generator;

static int integer(int low, int high) { return low + int(generator() % unsigned(high - low + 1)); }
static double uniform(double low, double high) { return low + (high - low) * (generator() / 4294967296.0); }
static double normal() {  // near enough: twelve uniform numbers
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform(0, 1);
    return sum;
}
static std::vector<float> normals(size_t n, double scale = 1) {
    std::vector<float> x(n);
    for (float &v : x) v = float(normal() * scale);
    return x;
}

static double from_half(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                        : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                       : std::ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

// The nearest number that float16 has, ties to even.
static double rounded_to_half(double x) {
    int exponent;
    std::frexp(x, &exponent);
    const double step = std::ldexp(1, std::max(exponent - 11, -24));
    const double nearest = std::nearbyint(x / step) * step;
    return std::fabs(nearest) > 65504 ? std::copysign(INFINITY, x) : nearest;
}

// Memory as in the model's arena: aligned, and readable 64 bytes around, but with nothing useful there.
class Room {
  public:
    explicit Room(size_t size) : size_(size), bytes_(new (std::align_val_t(64)) uint8_t[size + 128]) {
        for (size_t i = 0; i < size + 128; ++i) bytes_[i] = uint8_t(generator());
        std::memset(data(), 0, size);
    }
    ~Room() { operator delete[](bytes_, std::align_val_t(64)); }
    Room(const Room &) = delete;
    Room &operator=(const Room &) = delete;
    uint8_t *data() const { return bytes_ + 64; }
    size_t size() const { return size_; }

  private:
    size_t size_;
    uint8_t *bytes_;
};

// ---- Matrices ----------------------------------------------------------------------------------------------------

struct Layout {
    Kind kind;
    int bits, keep = 0, offset_bits = 0;
    bool minima = false;
    int rows = 0, columns = 0, group = 0;

    std::string text() const {
        const char *kinds[] = {"dense", "banded", "planes", "mask"};
        char line[128];
        std::snprintf(line, sizeof line, "%s %d %d %d %d %d %d %d", kinds[int(kind)], rows, columns, bits, group, keep,
                      offset_bits, minima);
        return line;
    }
};

static std::vector<Layout> layouts() {
    std::vector<Layout> all = {{Kind::dense, 4}, {Kind::dense, 6}, {Kind::dense, 8}, {Kind::dense, 4, 0, 0, true}};
    all.insert(all.end(), {{Kind::mask, 4}, {Kind::mask, 8}});
    for (int keep : {4, 6, 8, 10, 12}) {
        for (int offset_bits : {2, 3, 4}) all.push_back({Kind::banded, 8 - offset_bits, keep, offset_bits});
        all.push_back({Kind::planes, 4, keep, 2});
        all.push_back({Kind::planes, 8, keep, 4});
    }
    return all;
}

static int window_start(int keep, int window, int k) {
    const double spread = double(BLOCK) / keep;
    const int centred = int(std::nearbyint(k * spread - (window - spread) / 2));
    return std::min(std::max(centred, 0), BLOCK - window);
}

class Packed {
  public:
    Layout layout;
    Matrix m;
    int padded_rows, padded_columns;
    std::vector<int16_t> q;  // [padded rows][padded columns]
    std::vector<uint16_t> scales, minima;

    explicit Packed(const Layout &l) : layout(l) {
        m.kind = l.kind;
        m.rows = l.rows;
        m.columns = l.columns;
        m.bits = l.bits;
        m.keep = l.keep;
        m.offset_bits = l.offset_bits;
        m.row_blocks = (l.rows + ROWS - 1) / ROWS;
        if (l.kind == Kind::planes)
            while (m.pairs_per_chunk * l.keep / 2 * l.offset_bits % 8) m.pairs_per_chunk *= 2;
        const int pairs = (l.columns + PAIR - 1) / PAIR;
        m.pairs = (pairs + m.pairs_per_chunk - 1) / m.pairs_per_chunk * m.pairs_per_chunk;
        m.groups = l.group ? (l.columns + l.group - 1) / l.group : 1;
        m.pairs_per_group = l.group ? l.group / PAIR : m.pairs;
        for (int k = 0; k < l.keep; ++k) m.window_starts[k] = uint8_t(window_start(l.keep, 1 << l.offset_bits, k));
        padded_rows = m.row_blocks * ROWS;
        padded_columns = m.pairs * PAIR;
        q.assign(size_t(padded_rows) * padded_columns, 0);
        set_scales();
        if (l.kind == Kind::dense) pack_dense();
        else if (l.kind == Kind::mask) pack_mask();
        else pack_slots();
        m.values = values_->data();
        m.scales = scales.data();
        if (l.minima) m.minima = minima.data();
    }

    int weight(int row, int column) const { return q[size_t(row) * padded_columns + column]; }
    size_t scale_at(int row, int column) const {
        const int group = layout.group ? column / layout.group : 0;
        return (size_t(row / ROWS) * m.groups + group) * ROWS + row % ROWS;
    }

    void write(std::FILE *file) const {
        auto put = [file](const void *data, size_t size) {
            if (size && std::fwrite(data, 1, size, file) != size) throw std::runtime_error("cannot write");
        };
        std::fprintf(file, "%s %zu %zu\n", layout.text().c_str(), values_->size(), mask_ ? mask_->size() : 0);
        for (int row = 0; row < layout.rows; ++row) put(&q[size_t(row) * padded_columns], layout.columns * sizeof q[0]);
        put(scales.data(), scales.size() * sizeof scales[0]);
        put(minima.data(), minima.size() * sizeof minima[0]);
        put(values_->data(), values_->size());
        if (mask_) put(mask_->data(), mask_->size());
    }

  private:
    std::unique_ptr<Room> values_, mask_;

    int highest() const { return layout.minima ? 15 : (1 << (layout.bits - 1)) - 1; }
    int lowest() const { return layout.minima ? 0 : std::max(-(1 << (layout.bits - 1)), -127); }
    int16_t &at(int row, int column) { return q[size_t(row) * padded_columns + column]; }

    // Some rows have nothing but the largest or the smallest weight, for sums that grow as far as they can.
    int any_weight(int row) const {
        const int style = (row + layout.columns + layout.group / PAIR) % 6;
        return style == 0 ? highest() : style == 1 ? lowest() : integer(lowest(), highest());
    }

    void set_scales() {
        scales.assign(size_t(m.row_blocks) * m.groups * ROWS, 0);
        if (layout.minima) minima = scales;
        for (int row = 0; row < layout.rows; ++row)
            for (int group = 0; group < m.groups; ++group) {
                const size_t to = (size_t(row / ROWS) * m.groups + group) * ROWS + row % ROWS;
                const int odd = integer(0, 15);  // a zero and a subnormal number now and then
                scales[to] = uint16_t(odd == 0 ? 0 : odd == 1 ? integer(1, 1023) : integer(5 << 10, (15 << 10) - 1));
                if (layout.minima) minima[to] = uint16_t(integer(8 << 10, (15 << 10) - 1) | integer(0, 1) << 15);
            }
    }

    // Field of `bits` bits of a weight of a quad: lowest quads in the lowest bits.
    static void put(uint8_t *base, int bits, int quad, int row, int i, int value) {
        base[quad * bits / 8 * 64 + row % ROWS * LANE + i] |= uint8_t(value << quad % (8 / bits) * bits);
    }

    // Three of four quads have vectors of their own, above whose 6 bits the fourth lies, two bits in each.
    static void put_six(uint8_t *base, int quad, int row, int i, int value) {
        uint8_t *three = base + quad / 4 * 192 + row % ROWS * LANE + i;
        if (quad % 4 < 3) three[quad % 4 * 64] |= uint8_t(value);
        else
            for (int j = 0; j < 3; ++j) three[j * 64] |= uint8_t((value >> 2 * j & 3) << 6);
    }

    void pack_dense() {
        const size_t each = size_t(m.pairs) * 64 * layout.bits;
        values_ = std::make_unique<Room>(m.row_blocks * each);
        for (int row = 0; row < padded_rows; ++row)
            for (int column = 0; column < padded_columns; ++column) {
                const bool real = row < layout.rows && column < layout.columns;
                const int w = at(row, column) = int16_t(real ? any_weight(row) : 0);
                uint8_t *base = values_->data() + row / ROWS * each;
                const int quad = column / LANE;
                if (layout.bits == 6) {
                    put_six(base, quad, row, column % LANE, w + 32);
                    continue;
                }
                const int stored = layout.bits == 8 ? w & 255 : layout.minima ? w : w + 8;
                put(base, layout.bits, quad, row, column % LANE, stored);
            }
    }

    void pack_mask() {
        const int densities[] = {0, 5, 30, 50, 90, 100};  // per cent
        mask_ = std::make_unique<Room>(size_t(m.row_blocks) * m.pairs * QUADS * 8);
        std::vector<uint8_t> stored;
        for (int block = 0; block < m.row_blocks; ++block) {
            m.value_starts.push_back(stored.size());
            for (int pair = 0; pair < m.pairs; ++pair) {
                const int density = densities[integer(0, 5)];
                int count = 0;
                for (int i = 0; i < PAIR * ROWS; ++i) {  // quads, rows, columns of the quad
                    const int quad = i / 64, row = block * ROWS + i / LANE % ROWS;
                    const int column = pair * PAIR + quad * LANE + i % LANE;
                    int w = any_weight(row);
                    if (row >= layout.rows || column >= layout.columns || integer(1, 100) > density) w = 0;
                    at(row, column) = int16_t(w);
                    if (!w) continue;
                    mask_->data()[(size_t(block) * m.pairs + pair) * 64 + i / 8] |= uint8_t(1 << i % 8);
                    if (layout.bits == 8) stored.push_back(uint8_t(w));
                    else if (count++ % 2 == 0) stored.push_back(uint8_t(w + 8));
                    else stored.back() |= uint8_t((w + 8) << 4);
                }
            }
        }
        m.value_starts.push_back(stored.size());
        m.mask = reinterpret_cast<const uint64_t *>(mask_->data());
        values_ = std::make_unique<Room>(stored.size());
        std::copy(stored.begin(), stored.end(), values_->data());
    }

    // Kept columns increase within a block and lie in their windows; slots left empty hold zero and point anywhere.
    void pack_slots() {
        const int keep = layout.keep, window = 1 << layout.offset_bits, middle = 1 << (layout.bits - 1);
        const bool planes = layout.kind == Kind::planes;
        const int byte_bits = planes ? layout.bits + layout.offset_bits : 8;
        const size_t chunk = size_t(m.pairs_per_chunk) * keep / 2 * 64 * byte_bits / 8;
        values_ = std::make_unique<Room>(m.row_blocks * (m.pairs / m.pairs_per_chunk) * chunk);
        for (int row = 0; row < padded_rows; ++row)
            for (int block = 0; block < padded_columns / BLOCK; ++block) {
                const int lean = integer(0, 2);  // to the first column that is free, to the last, to none
                for (int k = 0, next = 0; k < keep; ++k) {
                    const int start = m.window_starts[k], low = std::max(start, next);
                    const int high = std::min(start + window, layout.columns - block * BLOCK) - 1;
                    int w = 0, offset = integer(0, window - 1);
                    if (row < layout.rows && low <= high && integer(0, 9)) {
                        const int column = lean == 0 ? low : lean == 1 ? high : integer(low, high);
                        at(row, block * BLOCK + column) = int16_t(w = any_weight(row));
                        offset = column - start;
                        next = column + 1;
                    }
                    const int pair = block / 2, in_chunk = pair % m.pairs_per_chunk;
                    const int slot = (in_chunk * 2 + block % 2) * keep + k, quad = slot / LANE, lane = slot % LANE;
                    uint8_t *base = values_->data() +
                                    (size_t(row / ROWS) * (m.pairs / m.pairs_per_chunk) + pair / m.pairs_per_chunk) * chunk;
                    if (planes) {
                        put(base, layout.offset_bits, quad, row, lane, offset);
                        base += m.pairs_per_chunk * keep / 2 * 64 * layout.offset_bits / 8;
                        put(base, layout.bits, quad, row, lane, w + middle);
                    } else {
                        put(base, 8, quad, row, lane, (w + middle) << layout.offset_bits | offset);
                    }
                }
            }
    }
};

// ---- Products ----------------------------------------------------------------------------------------------------

constexpr int TOKENS = 33;

// Tokens of every sort: with outliers, without, zeros, and the largest sums there are, of either sign.
static std::vector<float> tokens_of(int columns) {
    std::vector<float> x(size_t(TOKENS) * columns);
    for (int t = 0; t < TOKENS; ++t)
        for (int c = 0; c < columns; ++c) {
            const int sort = t % 5;
            const double value = sort == 0   ? normal() * (integer(0, 40) ? 1 : 30)
                                 : sort == 1 ? uniform(-1, 1)
                                 : sort == 2 ? 0
                                             : (sort == 3 ? 0.7 : -0.7);
            x[size_t(t) * columns + c] = float(value * (t % 7 + 1));
        }
    return x;
}

// Quantize tokens [first, first + tokens) and check that the integers stand for them; returns what they stand for,
// [tokens][columns].
static std::vector<double> quantized(const Kernels &k, const std::vector<float> &x, int columns, int pairs, int first,
                                     int tokens, Activations &out) {
    out = Activations();
    out.resize(tokens, pairs);
    for (int t = 0; t < tokens; ++t) k.quantize(x.data() + size_t(first + t) * columns, columns, t, out);
    out.gather(0, pairs);
    std::vector<double> stands_for(size_t(tokens) * pairs * PAIR), result(size_t(tokens) * columns);
    std::vector<int> entries(size_t(tokens) * pairs);
    for (int p = 0; p < pairs; ++p)
        for (int i = 0; i < tokens + out.extras[p]; ++i) {
            const size_t e = size_t(p) * out.capacity + i;
            const int t = out.token[e];
            bool sound = t >= 0 && t < tokens && (i >= tokens || t == i);
            check(sound, "quantize", "columns %d, %d tokens: entry %d of pair %d is of token %d", columns, tokens, i, p, t);
            if (!sound) continue;
            ++entries[size_t(t) * pairs + p];
            int sum = 0;
            for (int c = 0; c < PAIR; ++c) {
                const int q = out.integers[e * PAIR + c];
                sum += q;
                sound = sound && q >= -127 && out.biased[e * PAIR + c] == q + 128;
                stands_for[(size_t(t) * pairs + p) * PAIR + c] += double(q) * out.scale[e];
            }
            check(sound && sum == out.sum[e], "quantize", "columns %d, token %d, pair %d: sums or biased integers", columns,
                  t, p);
        }
    for (int t = 0; t < tokens; ++t) {
        const float *row = x.data() + size_t(first + t) * columns;
        double squares = 0;
        for (int c = 0; c < columns; ++c) squares += double(row[c]) * row[c];
        const double outlier = 3.5 * std::sqrt(squares / columns);
        for (int p = 0; p < pairs; ++p) {
            double largest = 0, worst = 0;
            for (int c = 0; c < PAIR; ++c) {
                const int column = p * PAIR + c;
                const double value = column < columns ? row[column] : 0;
                const double found = stands_for[(size_t(t) * pairs + p) * PAIR + c];
                largest = std::max(largest, std::fabs(value));
                worst = std::max(worst, std::fabs(found - value));
                if (column < columns) result[size_t(t) * columns + column] = found;
            }
            const int count = entries[size_t(t) * pairs + p];
            const bool expected = count == (largest > outlier ? 2 : 1) || near(largest, outlier, 1e-5 * outlier);
            // Half a step, and the rounding of float32.
            const double tolerance = largest / 254 / (count == 2 ? 254 : 1) * 1.0001 + 2e-7 * largest;
            check(expected && worst <= tolerance, "quantize", "columns %d, token %d, pair %d: %d entries, off by %g of %g",
                  columns, t, p, count, worst, largest);
        }
    }
    return result;
}

static void check_products(const Kernels &k) {
    constexpr int PADDING = 4;  // planes read up to four pairs at once
    for (int columns : {16, 31, 32, 33, 100, 576}) {
        const std::vector<float> x = tokens_of(columns);
        struct Run {
            int first, tokens;
            Activations x;
            std::vector<double> stands_for;
        };
        std::vector<Run> runs = {{0, 1, {}, {}}, {1, 1, {}, {}}, {2, 1, {}, {}}, {3, 1, {}, {}}, {4, 1, {}, {}},
                                 {0, 2, {}, {}}, {0, 5, {}, {}}, {0, TOKENS, {}, {}}};
        const int pairs = ((columns + PAIR - 1) / PAIR + PADDING - 1) / PADDING * PADDING;
        for (Run &run : runs) run.stands_for = quantized(k, x, columns, pairs, run.first, run.tokens, run.x);
        const std::vector<double> &all = runs.back().stands_for;
        for (const Run &run : runs)
            check(std::equal(run.stands_for.begin(), run.stands_for.end(), all.begin() + run.first * columns), "quantize",
                  "columns %d: a token's integers depend on its neighbours", columns);
        for (Layout layout : layouts())
            for (int rows : {1, 15, 16, 17, 40})
                for (int group : {32, 64, 128, 0}) {
                    layout.rows = rows;
                    layout.columns = columns;
                    layout.group = group;
                    const Packed packed(layout);
                    std::vector<double> expected(size_t(rows) * TOKENS), size(expected.size());
                    std::vector<double> w(columns), wide(columns);
                    for (int row = 0; row < rows; ++row) {
                        for (int c = 0; c < columns; ++c) {
                            const size_t at = packed.scale_at(row, c);
                            const double scaled = packed.weight(row, c) * from_half(packed.scales[at]);
                            const double minimum = layout.minima ? from_half(packed.minima[at]) : 0;
                            w[c] = scaled + minimum;
                            wide[c] = std::fabs(scaled) + std::fabs(minimum);
                        }
                        for (int t = 0; t < TOKENS; ++t) {
                            const double *a = &all[size_t(t) * columns];
                            double sum = 0, total = 0;
                            for (int c = 0; c < columns; ++c) {
                                sum += w[c] * a[c];
                                total += wide[c] * std::fabs(a[c]);
                            }
                            expected[size_t(row) * TOKENS + t] = sum;
                            size[size_t(row) * TOKENS + t] = total;
                        }
                    }
                    for (const Run &run : runs) {
                        const int n = run.tokens, blocks = packed.m.row_blocks;
                        std::vector<float> out(size_t(blocks) * n * ROWS, NAN);
                        k.multiply(packed.m, run.x, 0, 1, out.data());
                        if (blocks > 1) k.multiply(packed.m, run.x, 1, blocks, out.data() + n * ROWS);
                        for (int row = 0; row < rows; ++row)
                            for (int t = 0; t < n; ++t) {
                                const size_t at = size_t(row) * TOKENS + run.first + t;
                                const float found = out[(size_t(row / ROWS) * n + t) * ROWS + row % ROWS];
                                // Integers are exact; float32 rounds the sums of up to 36 entries.
                                check(near(found, expected[at], 2e-6 * size[at]), "multiply",
                                      "%s, %d tokens: row %d, token %d is %.9g, not %.9g", layout.text().c_str(), n, row, t,
                                      found, expected[at]);
                            }
                    }
                }
    }
}

// ---- Other functions ---------------------------------------------------------------------------------------------

static void check_norms(const Kernels &k) {
    for (int n : {1, 3, 16, 31, 576})
        for (bool with_bias : {false, true}) {
            std::vector<float> x = normals(n, 3), weight = normals(n), bias = normals(n);
            for (float &v : x) v += 2;
            double mean = 0, squares = 0, variance = 0;
            for (float v : x) mean += double(v) / n;
            for (float v : x) {
                squares += double(v) * v / n;
                variance += (v - mean) * (v - mean) / n;
            }
            for (bool layer : {false, true}) {
                std::vector<float> out(n, NAN);
                const float eps = 1e-5f;
                const auto norm = layer ? k.layer_norm : k.rms_norm;
                norm(x.data(), weight.data(), with_bias ? bias.data() : nullptr, n, eps, out.data());
                const double centre = layer ? mean : 0, factor = 1 / std::sqrt((layer ? variance : squares) + double(eps));
                for (int i = 0; i < n; ++i) {
                    const double w = factor * weight[i], b = with_bias ? bias[i] : 0, expected = (x[i] - centre) * w + b;
                    const double size = (std::fabs(x[i]) + std::fabs(centre)) * std::fabs(w) + std::fabs(b);
                    check(near(out[i], expected, 2e-6 * size), layer ? "layer_norm" : "rms_norm",
                          "n %d: %d is %.9g, not %.9g", n, i, out[i], expected);
                }
            }
        }
}

static void check_activations(const Kernels &k) {
    for (int n : {1, 5, 16, 67, 1000}) {
        std::vector<float> x = normals(n, 4), up = normals(n, 2);
        const float edges[] = {0.0f, -0.0f, 1e-6f, -1e-6f, 20, -20, 100, -100, 1e4f, -1e4f};
        for (int i = 0; i < 10 && 2 * i < n; ++i) x[2 * i] = edges[i];
        std::vector<float> gated = x, silu = x, gelu = x;
        k.gate(gated.data(), up.data(), n);
        k.silu(silu.data(), n);
        k.gelu(gelu.data(), n);
        for (int i = 0; i < n; ++i) {
            const double v = x[i], s = v / (1 + std::exp(-v)), g = v * std::erfc(-v / std::sqrt(2)) / 2;
            check(near(gated[i], s * up[i], 1e-6 * std::fabs(s * up[i]) + 1e-30), "gate",
                  "n %d: of %g and %g it is %.9g, not %.9g", n, v, up[i], gated[i], s * up[i]);
            const char *format = "n %d: of %g it is %.9g, not %.9g";
            check(near(silu[i], s, 1e-6 * std::fabs(s) + 1e-30), "silu", format, n, v, silu[i], s);
            check(near(gelu[i], g, 5e-7 * std::fabs(v)), "gelu", format, n, v, gelu[i], g);
        }
    }
}

static void check_rotation(const Kernels &k) {
    for (int half : {1, 2, 8, 31, 64}) {
        std::vector<float> x = normals(2 * half), cos(half), sin(half);
        for (int i = 0; i < half; ++i) {
            const double angle = uniform(-7, 7);
            cos[i] = float(std::cos(angle));
            sin[i] = float(std::sin(angle));
        }
        std::vector<float> out = x;
        k.rotate(out.data(), cos.data(), sin.data(), half);
        for (int i = 0; i < half; ++i) {
            const double a = x[i], b = x[half + i], tolerance = 2e-7 * (std::fabs(a) + std::fabs(b));
            const double expected[2] = {a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]};
            check(near(out[i], expected[0], tolerance) && near(out[half + i], expected[1], tolerance), "rotate",
                  "half %d: pair %d is %.9g and %.9g, not %.9g and %.9g", half, i, out[i], out[half + i], expected[0],
                  expected[1]);
        }
    }
}

// Keys and values as `store` left them, [row][head_dim], after checking that they are what was stored.
struct Stored {
    KeyValues kv;
    std::vector<uint8_t> key_bytes, value_bytes;
    std::vector<float> key_scales, value_scales;
    std::vector<double> keys, values;

    Stored(const Kernels &k, Cache type, int slots, int kv_heads, int head_dim, int context) {
        const size_t rows = size_t(slots) * kv_heads * context, n = rows * head_dim;
        key_bytes.resize(n * (type == Cache::f16 ? 2 : 1));
        value_bytes.resize(key_bytes.size());
        key_scales.resize(rows);
        value_scales.resize(rows);
        kv.type = type;
        kv.kv_heads = kv_heads;
        kv.head_dim = head_dim;
        kv.context = context;
        kv.keys = key_bytes.data();
        kv.values = value_bytes.data();
        kv.key_scales = key_scales.data();
        kv.value_scales = value_scales.data();
        for (size_t row = 0; row < rows; ++row) {
            std::vector<float> key = normals(head_dim);
            std::vector<float> value = normals(head_dim, row % 3 ? 1 : 1e-6);  // 1e-6 is subnormal in float16
            if (row % 5 == 4) std::fill(value.begin(), value.end(), 0.0f);
            if (row % 5 == 3) key[0] = row % 2 ? 1 + 0x1p-11f : 1 + 0x3p-11f;   // ties
            if (row % 50 == 7) value[0] = row % 4 == 1 ? 65519.0f : -65504.0f;  // the last that does not overflow
            k.store(kv, row, key.data(), value.data());
            add(key, key_bytes, key_scales[row], row, keys);
            add(value, value_bytes, value_scales[row], row, values);
        }
    }

    void add(const std::vector<float> &x, const std::vector<uint8_t> &bytes, float scale, size_t row,
             std::vector<double> &to) {
        double largest = 0;
        for (float v : x) largest = std::max(largest, std::fabs(double(v)));
        for (size_t i = 0; i < x.size(); ++i) {
            const size_t at = row * x.size() + i;
            double found;
            bool good;
            if (kv.type == Cache::f16) {
                uint16_t half;
                std::memcpy(&half, &bytes[2 * at], 2);
                found = from_half(half);
                good = found == rounded_to_half(x[i]);
            } else {
                found = double(int8_t(bytes[at])) * scale;
                good = near(scale, largest / 127, 1e-6 * scale) && near(found, x[i], largest / 254 * 1.0001);
            }
            check(good, "store", "%s, head_dim %zu: %.9g became %.9g", kv.type == Cache::f16 ? "f16" : "int8", x.size(), x[i],
                  found);
            to.push_back(found);
        }
    }
};

static void check_attention(const Kernels &k) {
    constexpr int SLOTS = 2, KV_HEADS = 2, CONTEXT = 70, GAP = 5;
    for (Cache type : {Cache::f16, Cache::int8})
        for (int n : {3, 8, 20, 64, 100}) {
            const Stored stored(k, type, SLOTS, KV_HEADS, n, CONTEXT);
            for (int tokens : {1, 4, 7})
                for (int position : {0, 3, 60})
                    for (int window : {0, 1, 5, 64})
                        for (float slope : {0.0f, 0.25f}) {
                            const size_t q_stride = n + 3, out_stride = n + GAP;
                            const std::vector<float> q = normals(tokens * q_stride);
                            std::vector<float> out(tokens * out_stride, 12345.0f), scores(QUERIES * size_t(position + tokens));
                            Attention a;
                            a.q = q.data();
                            a.out = out.data();
                            a.q_stride = q_stride;
                            a.out_stride = out_stride;
                            a.tokens = tokens;
                            a.slot = a.kv_head = 1;
                            a.position = position;
                            a.window = window;
                            a.scale = float(1 / std::sqrt(double(n)));
                            a.slope = slope;
                            k.attend(stored.kv, a, scores.data());
                            for (int t = 0; t < tokens; ++t) {
                                const int last = position + t, first = window ? std::max(0, last - window + 1) : 0;
                                std::vector<double> p;
                                double top = -INFINITY, total = 0;
                                for (int i = first; i <= last; ++i) {
                                    double score = 0;
                                    for (int c = 0; c < n; ++c)
                                        score += q[t * q_stride + c] * stored.keys[stored.kv.row(1, 1, i) * n + c];
                                    p.push_back(score * a.scale + slope * (i - last));
                                    top = std::max(top, p.back());
                                }
                                for (double &v : p) total += v = std::exp(v - top);
                                for (int c = 0; c < n; ++c) {
                                    double expected = 0, size = 0;
                                    for (int i = first; i <= last; ++i) {
                                        const double value = stored.values[stored.kv.row(1, 1, i) * n + c];
                                        const double part = p[i - first] / total * value;
                                        expected += part;
                                        size += std::fabs(part);
                                    }
                                    const float found = out[t * out_stride + c];
                                    check(near(found, expected, 5e-6 * size), "attend",
                                          "%s, head_dim %d, %d tokens from %d, window %d: token %d, %d is %.9g, not %.9g",
                                          type == Cache::f16 ? "f16" : "int8", n, tokens, position, window, t, c, found,
                                          expected);
                                }
                                for (int c = n; c < n + GAP; ++c)
                                    check(out[t * out_stride + c] == 12345.0f, "attend", "head_dim %d: wrote beyond the head", n);
                            }
                        }
        }
}

// ---- The whole ---------------------------------------------------------------------------------------------------

// Errors that no check may miss: one value in each result, off by a ten-thousandth or one unit.
static void spoil(float &x) { x = x * 1.0001f + 1e-4f; }

static const Kernels broken = {
    "broken",
    [](const Matrix &m, const Activations &x, int begin, int end, float *out) {
        scalar_kernels.multiply(m, x, begin, end, out);
        spoil(out[0]);
    },
    [](const float *x, int columns, int t, Activations &out) {
        scalar_kernels.quantize(x, columns, t, out);
        out.integers[size_t(t) * PAIR] ^= 1;
    },
    [](const float *x, const float *weight, const float *bias, int n, float eps, float *out) {
        scalar_kernels.rms_norm(x, weight, bias, n, eps, out);
        spoil(out[n - 1]);
    },
    [](const float *x, const float *weight, const float *bias, int n, float eps, float *out) {
        scalar_kernels.layer_norm(x, weight, bias, n, eps, out);
        spoil(out[n - 1]);
    },
    [](float *x, const float *up, int n) {
        scalar_kernels.gate(x, up, n);
        spoil(x[n - 1]);
    },
    [](float *x, int n) {
        scalar_kernels.silu(x, n);
        spoil(x[n - 1]);
    },
    [](float *x, int n) {
        scalar_kernels.gelu(x, n);
        spoil(x[n - 1]);
    },
    [](float *x, const float *cos, const float *sin, int half) {
        scalar_kernels.rotate(x, cos, sin, half);
        spoil(x[half]);
    },
    [](const KeyValues &kv, size_t row, const float *k, const float *v) {
        scalar_kernels.store(kv, row, k, v);
        static_cast<uint8_t *>(kv.values)[row * kv.head_dim * (kv.type == Cache::f16 ? 2 : 1)] ^= 1;
    },
    [](const KeyValues &kv, const Attention &a, float *scores) {
        scalar_kernels.attend(kv, a, scores);
        spoil(a.out[0]);
    },
};

static int write_matrices(const char *path) {
    std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path, "wb"), std::fclose);
    if (!file) throw std::runtime_error(std::string("cannot write ") + path);
    for (Layout layout : layouts())
        for (int columns : {31, 100, 288}) {
            layout.rows = 17;
            layout.columns = columns;
            layout.group = columns == 31 ? 0 : 64;
            Packed(layout).write(file.get());
        }
    return 0;
}

int main(int count, char **arguments) {
    const std::string name = count > 1 ? arguments[1] : "";
    if (name == "matrices" && count == 3) return write_matrices(arguments[2]);
    if (name.empty() || count != 2) {
        std::fprintf(stderr, "usage: check_kernels scalar|avx2|avx512|neon|broken, or check_kernels matrices FILE\n");
        return 2;
    }
    const Kernels *k = &broken;
    try {
        if (name != "broken") k = &kernels(name.c_str());
    } catch (const std::invalid_argument &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 77;
    }
    check_norms(*k);
    check_activations(*k);
    check_rotation(*k);
    check_attention(*k);
    check_products(*k);
    int failed = 0;
    for (const auto &[function, times] : failures) failed += times;
    std::printf("%s: %ld checks, %d failed\n", k->name, checks, failed);
    return failed ? 1 : 0;
}
