// x W^T on the CPU: weights packed so that a step reads each of them once, in order, for all rows.
//
// Packed: panels of 64 columns (rows of W) over all of K, one step of K after the other: 1 element of K in fp32, 2 in
// bfloat16, 4 in int8, each column's together: [panel][k / step][64][step]. The last panel and the last step are filled
// with zeros. Behind int8 panels come, for every column, its scale (fp32) and the sum of its weights (int32).
// A gated matrix [gate | up] has 16 columns of the gate and the same 16 of up in turn.
#pragma once

#include <cstdint>

#include "native/isa.h"

namespace retinar {

constexpr std::int64_t unit_columns = 16;  // what threads share out: a cache line of every kind of weights
constexpr std::int64_t panel_columns = 64;

enum class Kind { float32, bfloat16, int8 };

struct Packed {
  const void* data;
  std::int64_t outer;  // columns as the caller counts them, without padding
  std::int64_t inner;
  Kind kind;
  bool gated;

  RETINAR_INLINE std::int64_t halves() const { return gated ? 2 : 1; }
  // Units of 16 columns; gate and up are padded apart.
  RETINAR_INLINE std::int64_t units() const {
    return halves() * ((outer / halves() + unit_columns - 1) / unit_columns);
  }
  RETINAR_INLINE std::int64_t panels() const { return (units() * unit_columns + panel_columns - 1) / panel_columns; }
  RETINAR_INLINE std::int64_t step() const { return kind == Kind::float32 ? 1 : kind == Kind::bfloat16 ? 2 : 4; }
  RETINAR_INLINE std::int64_t steps() const { return (inner + step() - 1) / step(); }
  RETINAR_INLINE std::int64_t panel_elements() const { return steps() * panel_columns * step(); }
  RETINAR_INLINE std::int64_t elements() const { return panels() * panel_elements(); }
  RETINAR_INLINE const float* scales() const {
    return reinterpret_cast<const float*>(static_cast<const std::int8_t*>(data) + elements());
  }
  RETINAR_INLINE const std::int32_t* sums() const {
    return reinterpret_cast<const std::int32_t*>(scales() + panels() * panel_columns);
  }
};

// Writes weight [outer, inner], contiguous, into packed order: ``shape.elements()`` of its type.
void pack(const Packed& shape, const void* weight, void* packed);

}  // namespace retinar
