// What the bindings of the ops share. Arrays cross by DLPack.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>

#include "native/isa.h"

namespace retinar::binding {

namespace nb = nanobind;

using Input = nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>;
using Output = nb::ndarray<nb::device::cpu, nb::c_contig>;

// The named instruction set, or the best; std::invalid_argument for one that does not run here.
Isa choose(const std::optional<std::string>& wanted);

inline bool is_bfloat16(nb::dlpack::dtype type) {
  return type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16 && type.lanes == 1;
}

// Adds the class Decoder and pack().
void decode_step(nb::module_& module);

}  // namespace retinar::binding
