#include <cstdint>
#include <cstring>

#include "linear/cpu.h"

namespace retinar {

std::int64_t packed_elements(const Packed& shape) { return shape.panels() * shape.panel_elements(); }

void pack(const Packed& shape, const void* weight, void* packed) {
  const std::size_t size = shape.bfloat16 ? 2 : 4;
  const std::int64_t group = shape.bfloat16 ? 2 : 1;
  const std::int64_t half = shape.outer / shape.halves();
  std::memset(packed, 0, static_cast<std::size_t>(packed_elements(shape)) * size);
  for (std::int64_t row = 0; row < shape.outer; ++row) {
    std::int64_t column = row;
    if (shape.gated) {
      const std::int64_t place = row % half;
      column = (place / unit_columns * 2 + row / half) * unit_columns + place % unit_columns;
    }
    const std::int64_t base = column / panel_columns * shape.panel_elements() + column % panel_columns * group;
    for (std::int64_t k = 0; k < shape.inner; ++k) {
      const std::int64_t place = base + k / group * panel_columns * group + k % group;
      std::memcpy(static_cast<char*>(packed) + place * size,
                  static_cast<const char*>(weight) + (row * shape.inner + k) * size, size);
    }
  }
}

}  // namespace retinar
