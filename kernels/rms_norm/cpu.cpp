// RMSNorm forward: norm in fp32, rounded to the tensor's type, then the weight. Compiled once per instruction set.
//
// A row is summed by four accumulators in a fixed order, whatever the number of rows, so its bits depend on it alone.
#include "rms_norm/cpu.h"

#include "native/simd.h"

namespace retinar::RETINAR_ISA {
namespace {

template <typename T>
float sum_of_squares(const T* x, std::int64_t width) {
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

template <typename T>
void normalise(const RmsNorm& call) {
  const T* weight = static_cast<const T*>(call.weight);
  for (std::int64_t row = 0; row < call.rows; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * call.width;
    T* out = static_cast<T*>(call.out) + row * call.width;
    const float mean = sum_of_squares(x, call.width) / static_cast<float>(call.width);
    const float scale = 1.0f / __builtin_sqrtf(mean + call.eps);
    const Vec scales = broadcast(scale);
    std::int64_t i = 0;
    for (; i + Vec::width <= call.width; i += Vec::width) {
      store(out + i, round_to<T>(load(x + i) * scales) * load(weight + i));
    }
    for (; i < call.width; ++i) {
      const float normed = to_float(from_float<T>(to_float(x[i]) * scale));
      out[i] = from_float<T>(normed * to_float(weight[i]));
    }
  }
}

}  // namespace

void rms_norm(const RmsNorm& call) {
  if (call.bfloat16) {
    normalise<BFloat16>(call);
  } else {
    normalise<float>(call);
  }
}

}  // namespace retinar::RETINAR_ISA
