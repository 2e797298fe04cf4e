#include "cfg_sample/filter.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace retinar {
namespace {

constexpr float nothing = -std::numeric_limits<float>::infinity();

// Orders as wanted when sorted downwards: larger logits first, of equal ones the lower code.
std::uint64_t key(float logit, std::uint32_t code) {
  std::uint32_t bits;
  logit += 0.0f;  // of the two zeros, one
  std::memcpy(&bits, &logit, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<std::uint64_t>(bits) << 32 | (0xFFFFFFFFu - code);
}

std::uint32_t code_of(std::uint64_t key) { return 0xFFFFFFFFu - static_cast<std::uint32_t>(key); }

}  // namespace

void filter(float* logits, std::int64_t count, std::int32_t top_k, float top_p, FilterMemory& scratch) {
  const bool limited = top_k > 0 && top_k < count, nucleus = top_p < 1.0f;
  if (!limited && !nucleus) return;
  scratch.resize(static_cast<std::size_t>(count));
  for (std::int64_t code = 0; code < count; ++code) {
    scratch[static_cast<std::size_t>(code)] = key(logits[code], static_cast<std::uint32_t>(code));
  }
  const auto begin = scratch.begin(), end = scratch.end();
  const std::greater<> falling;
  if (limited) {
    std::nth_element(begin, begin + (top_k - 1), end, falling);
    const float least = logits[code_of(scratch[static_cast<std::size_t>(top_k) - 1])];
    for (std::int64_t code = 0; code < count; ++code) {
      if (logits[code] < least) logits[code] = nothing;
    }
  }
  if (!nucleus) return;
  const float top = *std::max_element(logits, logits + count);
  double total = 0.0;
  for (std::int64_t code = 0; code < count; ++code) total += std::exp(static_cast<double>(logits[code] - top));
  // The likeliest few are nearly always enough: sort so many more at a time until the sum is reached.
  double before = 0.0;
  std::int64_t sorted = 0;
  for (std::int64_t wanted = 256; sorted < count; wanted *= 4) {
    const std::int64_t next = std::min(wanted, count);
    if (next < count) std::nth_element(begin + sorted, begin + next, end, falling);
    std::sort(begin + sorted, begin + next, falling);
    for (; sorted < next; ++sorted) {
      if (before > static_cast<double>(top_p) * total) {
        for (std::int64_t rest = sorted; rest < count; ++rest) {
          logits[code_of(scratch[static_cast<std::size_t>(rest)])] = nothing;
        }
        return;
      }
      before += std::exp(static_cast<double>(logits[code_of(scratch[static_cast<std::size_t>(sorted)])] - top));
    }
  }
}

}  // namespace retinar
