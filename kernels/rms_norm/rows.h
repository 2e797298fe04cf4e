// The norm of one row; for the kernels of every instruction set.
#pragma once

#include <cstdint>

#include "native/simd.h"

namespace retinar::RETINAR_ISA {

// Four accumulators in a fixed order, whatever the number of rows, so a row's bits depend on it alone.
template <typename T>
inline float sum_of_squares(const T* x, std::int64_t width) {
  constexpr int accumulators = 4;  // enough to hide the latency of a fused multiply-add
  Vec part[accumulators];
  for (Vec& p : part) p = broadcast(0.0f);
  std::int64_t i = 0;
  for (; i + accumulators * Vec::width <= width; i += accumulators * Vec::width) {
    for (int a = 0; a < accumulators; ++a) {
      const Vec value = load(x + i + a * Vec::width);
      part[a] = fma(value, value, part[a]);
    }
  }
  for (; i + Vec::width <= width; i += Vec::width) {
    const Vec value = load(x + i);
    part[0] = fma(value, value, part[0]);
  }
  float total = sum((part[0] + part[1]) + (part[2] + part[3]));
  for (; i < width; ++i) {
    const float value = to_float(x[i]);
    total += value * value;
  }
  return total;
}

// x [width] normed in fp32, rounded to T, times the weight, rounded to T; out in any type that holds it.
template <typename T, typename X, typename Out>
inline void norm_row(const X* x, const T* weight, Out* out, std::int64_t width, float eps) {
  const float mean = sum_of_squares(x, width) / static_cast<float>(width);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  const Vec scales = broadcast(scale);
  std::int64_t i = 0;
  for (; i + Vec::width <= width; i += Vec::width) {
    store(out + i, round_to<T>(round_to<T>(load(x + i) * scales) * load(weight + i)));
  }
  for (; i < width; ++i) {
    const float normed = to_float(from_float<T>(to_float(x[i]) * scale));
    out[i] = from_float<Out>(to_float(from_float<T>(normed * to_float(weight[i]))));
  }
}

}  // namespace retinar::RETINAR_ISA
