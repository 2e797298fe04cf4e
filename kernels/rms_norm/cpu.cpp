// RMSNorm forward: norm in fp32, rounded to the tensor's type, then the weight. Compiled once per instruction set.
#include "rms_norm/cpu.h"

#include "rms_norm/rows.h"

namespace retinar::RETINAR_ISA {
namespace {

template <typename T>
void normalise(const RmsNorm& call) {
  for (std::int64_t row = 0; row < call.rows; ++row) {
    norm_row<T>(static_cast<const T*>(call.x) + row * call.width, static_cast<const T*>(call.weight),
                static_cast<T*>(call.out) + row * call.width, call.width, call.eps);
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
