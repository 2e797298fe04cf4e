// The binding of the decode step: a Decoder keeps packed weights and threads; a step is one call without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <mutex>
#include <stdexcept>
#include <vector>

#include "decode_step/cpu.h"
#include "native/binding.h"

namespace retinar::binding {
namespace {

using namespace nb::literals;

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

Kind kind_of(const Input& weight) {
  if (is_bfloat16(weight.dtype())) return Kind::bfloat16;
  if (weight.dtype() == nb::dtype<std::int8_t>()) return Kind::int8;
  expect(weight.dtype() == nb::dtype<float>(), "expected weights in float32, bfloat16 or int8");
  return Kind::float32;
}

Packed shape_of(const Input& weight, bool gated) {
  expect(weight.ndim() == 2, "pack: expected a weight [outer, inner]");
  const auto outer = static_cast<std::int64_t>(weight.shape(0));
  expect(!gated || outer % 2 == 0, "pack: expected an even number of rows [gate | up]");
  return {nullptr, outer, static_cast<std::int64_t>(weight.shape(1)), kind_of(weight), gated};
}

class Decoder {
 public:
  Decoder(const std::vector<std::int64_t>& sizes, float eps, const std::vector<Input>& embeddings,
          const std::vector<std::vector<Input>>& layers, const Input& norm, const Input& output, const Input& rope,
          int threads, bool pin, const std::optional<std::string>& isa)
      : run_(RETINAR_SELECT(choose(isa), decode_step)), pool_(threads < 1 ? 1 : threads, pin) {
    expect(threads >= 1, "Decoder: expected at least one thread");
    expect(sizes.size() == 6, "Decoder: expected dim, heads, groups, head_dim, hidden, vocabulary");
    expect(embeddings.size() == 2, "Decoder: expected class and code embeddings");
    model_.bfloat16 = is_bfloat16(norm.dtype());
    model_.kind = kind_of(output);
    model_.dim = sizes[0];
    model_.heads = sizes[1];
    model_.groups = sizes[2];
    model_.head_dim = sizes[3];
    model_.hidden = sizes[4];
    model_.vocabulary = sizes[5];
    model_.classes = static_cast<std::int64_t>(embeddings[0].shape(0));
    model_.positions = static_cast<std::int64_t>(rope.shape(0));
    model_.eps = eps;
    model_.class_embedding = keep(embeddings[0]);
    model_.code_embedding = keep(embeddings[1]);
    model_.norm = keep(norm);
    model_.rope = static_cast<const float*>(keep(rope));
    const std::int64_t query = model_.heads * model_.head_dim, shared = model_.groups * model_.head_dim;
    for (const std::vector<Input>& layer : layers) {
      expect(layer.size() == 6, "Decoder: expected attention_norm, wqkv, wo, ffn_norm, w13, w2 in a layer");
      model_.layers.push_back({keep(layer[0]), keep(layer[3]), packed(layer[1], query + 2 * shared, model_.dim, false),
                               packed(layer[2], model_.dim, query, false),
                               packed(layer[4], 2 * model_.hidden, model_.dim, true),
                               packed(layer[5], model_.dim, model_.hidden, false)});
    }
    model_.output = packed(output, model_.vocabulary, model_.dim, false);
  }

  void step(const Output& keys, const Output& values, const std::optional<Output>& key_scales,
            const std::optional<Output>& value_scales, const Input& tokens, const Input& positions, const Input& table,
            const Input& cond_row, const Input& null_row, const Input& cfg_scale, const Input& temperature,
            const Input& top_k, const Input& top_p, const Input& seed, const Input& index, const Output& codes,
            const Output& logits, const std::optional<Output>& seconds) {
    expect(keys.ndim() == 5 && keys.shape(0) == model_.layers.size() && table.ndim() == 2,
           "step: expected caches [layers, pages, slots, groups, head_dim] and a table [rows, columns]");
    const Step step{static_cast<std::int64_t>(tokens.shape(0)),
                    static_cast<std::int64_t>(cond_row.shape(0)),
                    static_cast<std::int64_t>(table.shape(1)),
                    static_cast<const std::int64_t*>(tokens.data()),
                    static_cast<const std::int32_t*>(positions.data()),
                    static_cast<const std::int32_t*>(table.data()),
                    static_cast<const std::int32_t*>(cond_row.data()),
                    static_cast<const std::int32_t*>(null_row.data()),
                    static_cast<const float*>(cfg_scale.data()),
                    static_cast<const float*>(temperature.data()),
                    static_cast<const std::int32_t*>(top_k.data()),
                    static_cast<const float*>(top_p.data()),
                    static_cast<const std::int64_t*>(seed.data()),
                    static_cast<const std::int64_t*>(index.data()),
                    keys.data(),
                    values.data(),
                    key_scales ? static_cast<float*>(key_scales->data()) : nullptr,
                    value_scales ? static_cast<float*>(value_scales->data()) : nullptr,
                    static_cast<std::int64_t>(keys.shape(1)),
                    static_cast<std::int64_t>(keys.shape(2)),
                    static_cast<float*>(logits.data()),
                    static_cast<std::int64_t*>(codes.data()),
                    seconds ? static_cast<double*>(seconds->data()) : nullptr};
    check(step);
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> alone(busy_);
    scratch_.prepare(model_, step, pool_.threads());
    run_({model_, step, scratch_, pool_});
  }

 private:
  // Everything that is used as an index: a wrong one would read somewhere else.
  void check(const Step& step) const {
    for (std::int64_t row = 0; row < step.rows; ++row) {
      const std::int64_t position = step.positions[row], token = step.tokens[row];
      expect(position >= 0 && position < model_.positions && position < step.columns * step.page_slots,
             "step: expected positions that the rope table and the block table reach");
      expect(token >= 0 && token < (position == 0 ? model_.classes : model_.vocabulary),
             "step: expected a class at position 0 and a code elsewhere");
      for (std::int64_t column = 0; column <= position / step.page_slots; ++column) {
        const std::int32_t page = step.table[row * step.columns + column];
        expect(page >= 0 && page < step.pages, "step: expected pages of the cache in the block table");
      }
    }
    for (std::int64_t image = 0; image < step.images; ++image) {
      expect(step.cond_row[image] >= 0 && step.cond_row[image] < step.rows && step.null_row[image] >= -1 &&
                 step.null_row[image] < step.rows,
             "step: expected rows of the step for every image");
    }
  }

  const void* keep(const Input& array) {
    kept_.push_back(array);
    return array.data();
  }

  Packed packed(const Input& array, std::int64_t outer, std::int64_t inner, bool gated) {
    const Packed shape{keep(array), outer, inner, model_.kind, gated};
    const std::int64_t behind = model_.kind == Kind::int8 ? shape.panels() * panel_columns * 8 : 0;
    expect(kind_of(array) == model_.kind && static_cast<std::int64_t>(array.size()) == shape.elements() + behind,
           "Decoder: expected packed weights of the model's sizes, all of one type");
    return shape;
  }

  void (*run_)(const DecodeCall&);
  Model model_{};
  Scratch scratch_;
  Pool pool_;
  std::vector<Input> kept_;
  std::mutex busy_;  // one scratch, one pool: one step at a time
};

}  // namespace

void decode_step(nb::module_& module) {
  module.def(
      "packed_elements", [](const Input& weight, bool gated) { return shape_of(weight, gated).elements(); },
      "weight"_a.noconvert(), "gated"_a, "How many elements a weight [outer, inner] has when it is packed.");
  module.def(
      "pack",
      [](const Input& weight, const Output& out, bool gated) {
        const Packed shape = shape_of(weight, gated);
        expect(static_cast<std::int64_t>(out.size()) == shape.elements() && out.dtype() == weight.dtype(),
               "pack: expected packed_elements(weight) elements of the weight's type");
        const nb::gil_scoped_release released;
        pack(shape, weight.data(), out.data());
      },
      "weight"_a.noconvert(), "out"_a.noconvert(), "gated"_a, "Writes a weight into out in packed order.");
  module.def(
      "huge_pages",
      [](const Output& memory) {
#ifdef __linux__
        constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
        const auto first = (reinterpret_cast<std::uintptr_t>(memory.data()) + page - 1) / page * page;
        const auto last = (reinterpret_cast<std::uintptr_t>(memory.data()) + memory.nbytes()) / page * page;
        if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
        static_cast<void>(memory);
#endif
      },
      "memory"_a.noconvert(),
      "Asks for pages of 2 MiB, before the memory is first written: a step walks through all of it.");
  nb::class_<Decoder>(module, "Decoder", "Packed weights, threads and memory of a model's decode steps.")
      .def(nb::init<const std::vector<std::int64_t>&, float, const std::vector<Input>&,
                    const std::vector<std::vector<Input>>&, const Input&, const Input&, const Input&, int, bool,
                    const std::optional<std::string>&>(),
           "sizes"_a, "eps"_a, "embeddings"_a, "layers"_a, "norm"_a, "output"_a, "rope"_a, "threads"_a, "pin"_a,
           "isa"_a.none() = nb::none())
      .def("step", &Decoder::step, "keys"_a.noconvert(), "values"_a.noconvert(),
           "key_scales"_a.noconvert().none(), "value_scales"_a.noconvert().none(), "tokens"_a,
           "positions"_a, "table"_a, "cond_row"_a, "null_row"_a, "cfg_scale"_a, "temperature"_a, "top_k"_a, "top_p"_a,
           "seed"_a, "index"_a, "codes"_a.noconvert(), "logits"_a.noconvert(),
           "seconds"_a.noconvert().none() = nb::none(),
           "One step; writes the caches, codes [images] and logits [rows, vocabulary]; adds to float64 seconds [phases].");
  module.attr("phases") = nb::make_tuple("embedding", "norms", "wqkv", "attention", "wo", "w13", "w2", "output", "sample");
}

}  // namespace retinar::binding
