// RMSNorm forward on the CPU.
#pragma once

#include <cstdint>

#include "native/isa.h"

namespace retinar {

// Contiguous [rows, width] and weight [width], all fp32 or all bfloat16.
struct RmsNorm {
  const void* x;
  const void* weight;
  void* out;
  std::int64_t rows;
  std::int64_t width;
  float eps;
  bool bfloat16;
};

}  // namespace retinar

RETINAR_DECLARE(void rms_norm(const RmsNorm& call))
