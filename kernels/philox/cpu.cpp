// Words and noise by themselves. Compiled once per instruction set.
#include "philox/cpu.h"

#include "philox/noise.h"

namespace retinar::RETINAR_ISA {

void philox_words(Words& call) {
  std::uint32_t words[4][noise_quads];
  philox(call.counter[0], call.counter[1], call.counter[2], call.counter[3], call.seed, words);
  for (int j = 0; j < 4; ++j) call.out[j] = words[j][0];
}

void gumbel_row(const Noise& call) {
  for (std::int64_t start = 0; start < call.count; start += noise_block) {
    float noise[noise_block];
    gumbel_noise(static_cast<std::uint32_t>(start / 4), call.position, call.index, 0, call.seed, noise);
    for (std::int64_t i = 0; i < noise_block && start + i < call.count; ++i) call.out[start + i] = noise[i];
  }
}

}  // namespace retinar::RETINAR_ISA
