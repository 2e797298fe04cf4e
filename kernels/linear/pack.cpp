#include <cstring>

#include "linear/cpu.h"

namespace retinar {

void pack(const Packed& shape, const void* weight, void* packed) {
  const std::int64_t group = shape.step(), size = 4 / group;
  const std::int64_t half = shape.outer / shape.halves();
  std::memset(packed, 0, static_cast<std::size_t>(shape.elements() * size));
  for (std::int64_t row = 0; row < shape.outer; ++row) {
    std::int64_t column = row;
    if (shape.gated) {
      const std::int64_t place = row % half;
      column = (place / unit_columns * 2 + row / half) * unit_columns + place % unit_columns;
    }
    char* target = static_cast<char*>(packed) +
                   (column / panel_columns * shape.panel_elements() + column % panel_columns * group) * size;
    const char* source = static_cast<const char*>(weight) + row * shape.inner * size;
    for (std::int64_t k = 0; k < shape.inner; k += group, target += panel_columns * group * size) {
      const std::int64_t left = shape.inner - k < group ? shape.inner - k : group;
      std::memcpy(target, source + k * size, static_cast<std::size_t>(left * size));
    }
  }
}

}  // namespace retinar
