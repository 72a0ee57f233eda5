// The Python module zoo.runner._native; zoo/runner/native.py is its face.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "model.h"

namespace nb = nanobind;
using namespace zoo;

using Integers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Extent = std::tuple<uint64_t, uint64_t>;  // offset, size

static Span span(const Extent &e) { return {std::get<0>(e), std::get<1>(e)}; }

static Kind kind_of(const std::string &name) {
    if (name == "dense") return Kind::dense;
    if (name == "banded") return Kind::banded;
    if (name == "planes") return Kind::planes;
    if (name == "mask") return Kind::mask;
    throw std::invalid_argument("no kind of layout is called " + name);
}

NB_MODULE(_native, module) {
    module.def("best_isa", &best_isa);
    module.def("read_bandwidth", &read_bandwidth, nb::arg("bytes"), nb::arg("threads"), nb::arg("repeats") = 5,
               nb::call_guard<nb::gil_scoped_release>());

    nb::class_<Model>(module, "Model")
        .def(
            "__init__",
            [](Model *self, int vocabulary, int hidden, int intermediate, int layers, int heads, int kv_heads, int head_dim,
               bool rms, bool silu, bool gated, bool tied, float norm_eps, float softmax_scale, float logit_scale,
               int sliding_window, float clip_qkv, int slots, int context, int threads, bool int8_cache,
               const std::string &isa) {
                const Shape shape{vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, rms, silu, gated, tied,
                                  norm_eps, softmax_scale, logit_scale, sliding_window, clip_qkv};
                new (self) Model(shape, slots, context, threads, int8_cache ? Cache::int8 : Cache::f16, isa);
            },
            nb::kw_only(), nb::arg("vocabulary"), nb::arg("hidden"), nb::arg("intermediate"), nb::arg("layers"),
            nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("rms"), nb::arg("silu"), nb::arg("gated"),
            nb::arg("tied"), nb::arg("norm_eps"), nb::arg("softmax_scale"), nb::arg("logit_scale"),
            nb::arg("sliding_window"), nb::arg("clip_qkv"), nb::arg("slots"), nb::arg("context"), nb::arg("threads"),
            nb::arg("int8_cache"), nb::arg("isa"))
        .def(
            "add_matrix",
            [](Model &self, const std::string &name, const std::string &kind, int rows, int columns, int bits, int keep,
               int offset_bits, int row_blocks, int pairs, int groups, int pairs_per_group, int pairs_per_chunk,
               const std::vector<int> &window_starts, Extent values, Extent scales, Extent minima, Extent mask, Extent bias) {
                Matrix m;
                m.kind = kind_of(kind);
                m.rows = rows;
                m.columns = columns;
                m.bits = bits;
                m.keep = keep;
                m.offset_bits = offset_bits;
                m.row_blocks = row_blocks;
                m.pairs = pairs;
                m.groups = groups;
                m.pairs_per_group = pairs_per_group;
                m.pairs_per_chunk = pairs_per_chunk;
                for (size_t k = 0; k < window_starts.size() && k < BLOCK; ++k) m.window_starts[k] = uint8_t(window_starts[k]);
                self.add_matrix(name, std::move(m), span(values), span(scales), span(minima), span(mask), span(bias));
            },
            nb::kw_only(), nb::arg("name"), nb::arg("kind"), nb::arg("rows"), nb::arg("columns"), nb::arg("bits"),
            nb::arg("keep"), nb::arg("offset_bits"), nb::arg("row_blocks"), nb::arg("pairs"), nb::arg("groups"),
            nb::arg("pairs_per_group"), nb::arg("pairs_per_chunk"), nb::arg("window_starts"), nb::arg("values"),
            nb::arg("scales"), nb::arg("minima"), nb::arg("mask"), nb::arg("bias"))
        .def("add_norm", [](Model &self, const std::string &name, Extent weight, Extent bias) {
            self.add_norm(name, span(weight), span(bias));
        })
        .def("load", &Model::load, nb::call_guard<nb::gil_scoped_release>())
        .def("set_rope", [](Model &self, Floats cos, Floats sin) {
            if (cos.shape(0) != sin.shape(0) || cos.shape(1) != sin.shape(1))
                throw std::invalid_argument("arrays of different lengths");
            self.set_rope({cos.data(), cos.data() + cos.size()}, {sin.data(), sin.data() + sin.size()}, int(cos.shape(0)),
                          int(cos.shape(1)));
        })
        .def("set_slopes", &Model::set_slopes)
        .def_prop_ro("weight_bytes", &Model::weight_bytes)
        .def_prop_ro("isa", [](const Model &self) { return std::string(self.isa()); })
        .def("forward",
             [](Model &self, Integers tokens, Integers slots, Integers positions, Integers wanted,
                nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> logits) {
                 const size_t count = tokens.shape(0);
                 if (slots.shape(0) != count || positions.shape(0) != count || logits.shape(0) != wanted.shape(0) ||
                     logits.shape(1) != size_t(self.shape().vocabulary))
                     throw std::invalid_argument("arrays of different lengths");
                 bool interrupted = false;
                 auto ask = [&interrupted] {
                     nb::gil_scoped_acquire held;
                     return interrupted = PyErr_CheckSignals() != 0;
                 };
                 {
                     nb::gil_scoped_release released;
                     try {
                         self.forward(tokens.data(), slots.data(), positions.data(), int(count), wanted.data(),
                                      int(wanted.shape(0)), logits.data(), ask);
                     } catch (const Model::Interrupted &) {
                     }
                 }
                 if (interrupted) throw nb::python_error();
             });
}
