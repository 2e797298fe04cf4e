// x W^T on the CPU: weights packed so that a step reads each of them once, in order, for all rows.
//
// Packed: panels of 64 columns (rows of W) over all of K, one step of K after the other; the last panel and, for bfloat16,
// an odd K are filled with zeros. fp32: [panel][k][64]. bfloat16: [panel][k / 2][64][2], pairs of neighbours in k.
// A gated matrix [gate | up] has 16 columns of the gate and the same 16 of up in turn.
#pragma once

#include <cstdint>

#include "native/isa.h"

namespace retinar {

constexpr std::int64_t unit_columns = 16;   // what threads share out: a cache line of fp32 or of bfloat16 pairs
constexpr std::int64_t panel_columns = 64;

struct Packed {
  const void* data;
  std::int64_t outer;  // columns as the caller counts them, without padding
  std::int64_t inner;
  bool bfloat16;
  bool gated;

  RETINAR_INLINE std::int64_t halves() const { return gated ? 2 : 1; }
  // Units of 16 columns; gate and up are padded apart.
  RETINAR_INLINE std::int64_t units() const { return halves() * ((outer / halves() + unit_columns - 1) / unit_columns); }
  RETINAR_INLINE std::int64_t panels() const { return (units() * unit_columns + panel_columns - 1) / panel_columns; }
  RETINAR_INLINE std::int64_t steps() const { return bfloat16 ? (inner + 1) / 2 : inner; }
  RETINAR_INLINE std::int64_t panel_elements() const { return steps() * panel_columns * (bfloat16 ? 2 : 1); }
};

// The number of elements of a packed matrix.
std::int64_t packed_elements(const Packed& shape);

// Writes weight [outer, inner], contiguous, into packed order.
void pack(const Packed& shape, const void* weight, void* packed);

}  // namespace retinar
