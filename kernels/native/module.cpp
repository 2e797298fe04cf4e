// retinar.kernels._native: the binding of the CPU kernels. Arrays cross by DLPack; the GIL is released while they run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "native/binding.h"
#include "native/isa.h"
#include "philox/cpu.h"
#include "rms_norm/cpu.h"

namespace nb = nanobind;
using namespace nb::literals;
using retinar::Isa;

namespace {

using retinar::binding::Input;
using retinar::binding::Output;
using retinar::binding::choose;
using retinar::binding::is_bfloat16;

constexpr Isa all[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

const char* name(Isa isa) { return retinar::names[static_cast<int>(isa)]; }

std::vector<std::string> runnable() {
  std::vector<std::string> found;
  for (Isa isa : all) {
    if (retinar::runnable(isa)) found.emplace_back(name(isa));
  }
  return found;
}

}  // namespace

Isa retinar::binding::choose(const std::optional<std::string>& wanted) {
  if (!wanted) {
    static const Isa best = retinar::best();
    return best;
  }
  for (Isa isa : all) {
    if (*wanted == name(isa) && retinar::runnable(isa)) return isa;
  }
  throw std::invalid_argument("instruction set " + *wanted + " is unknown or does not run on this processor");
}

namespace {

void rms_norm(const Input& x, const Input& weight, const Output& out, float eps,
              const std::optional<std::string>& isa) {
  if (x.ndim() != 2 || out.ndim() != 2 || weight.ndim() != 1 || x.shape(0) != out.shape(0) ||
      x.shape(1) != out.shape(1) || x.shape(1) != weight.shape(0)) {
    throw std::invalid_argument("rms_norm: expected x [rows, width], weight [width], out [rows, width]");
  }
  const bool bfloat16 = is_bfloat16(x.dtype());
  if (x.dtype() != weight.dtype() || x.dtype() != out.dtype() || (!bfloat16 && x.dtype() != nb::dtype<float>())) {
    throw std::invalid_argument("rms_norm: expected float32 or bfloat16, the same for all three arrays");
  }
  const retinar::RmsNorm call{x.data(),
                              weight.data(),
                              out.data(),
                              static_cast<std::int64_t>(x.shape(0)),
                              static_cast<std::int64_t>(x.shape(1)),
                              eps,
                              bfloat16};
  const auto run = RETINAR_SELECT(choose(isa), rms_norm);
  const nb::gil_scoped_release released;
  run(call);
}

std::vector<std::uint32_t> philox(const std::vector<std::uint32_t>& counter, std::uint64_t seed,
                                  const std::optional<std::string>& isa) {
  if (counter.size() != 4) throw std::invalid_argument("philox: expected a counter of four words");
  retinar::Words call{{counter[0], counter[1], counter[2], counter[3]}, seed, {}};
  RETINAR_SELECT(choose(isa), philox_words)(call);
  return {call.out, call.out + 4};
}

void gumbel_noise(std::uint64_t seed, std::uint32_t index, std::uint32_t position, const Output& out,
                  const std::optional<std::string>& isa) {
  if (out.ndim() != 1 || out.dtype() != nb::dtype<float>()) {
    throw std::invalid_argument("gumbel_noise: expected out float32 [vocabulary]");
  }
  RETINAR_SELECT(choose(isa), gumbel_row)
  ({seed, index, position, static_cast<float*>(out.data()), static_cast<std::int64_t>(out.shape(0))});
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Native CPU kernels of retinar.";
  module.def("isa", [] { return std::string(name(choose(std::nullopt))); }, "The instruction set in use.");
  module.def("isas", &runnable, "The instruction sets that this processor can run.");
  module.def("rms_norm", &rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "out"_a.noconvert(), "eps"_a,
             "isa"_a.none() = nb::none(), "RMSNorm forward into out; isa names one instruction set.");
  module.def("philox", &philox, "counter"_a, "seed"_a, "isa"_a.none() = nb::none(), "The four words of a counter.");
  module.def("gumbel_noise", &gumbel_noise, "seed"_a, "index"_a, "position"_a, "out"_a.noconvert(),
             "isa"_a.none() = nb::none(), "Noise of the codes 0 to len(out) - 1.");
  retinar::binding::decode_step(module);
}
