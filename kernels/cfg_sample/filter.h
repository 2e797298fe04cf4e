// Top-k and top-p over the logits of one image.
#pragma once

#include <cstdint>
#include <vector>

namespace retinar {

using FilterMemory = std::vector<std::uint64_t>;

// Writes -inf over what is dropped: first logits strictly below the k-th largest (0 or >= count: none), then, by falling
// logit and then by code, every code before which the probabilities sum to more than p (1: none).
void filter(float* logits, std::int64_t count, std::int32_t top_k, float top_p, FilterMemory& memory);

}  // namespace retinar
