// The random numbers on their own, as tests want them; a decode step uses noise.h.
#pragma once

#include <cstdint>

#include "native/isa.h"

namespace retinar {

// A counter, a key, and where its four words go.
struct Words {
  std::uint32_t counter[4];
  std::uint64_t seed;
  std::uint32_t out[4];
};

// The noise of the codes 0 to count - 1.
struct Noise {
  std::uint64_t seed;
  std::uint32_t index, position;
  float* out;
  std::int64_t count;
};

}  // namespace retinar

RETINAR_DECLARE(void philox_words(Words& call))
RETINAR_DECLARE(void gumbel_row(const Noise& call))
