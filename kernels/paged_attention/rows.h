// One decode step of attention for some heads of one row, over the pages that it uses; for the kernels of every
// instruction set.
#pragma once

#include <cstdint>

#include "native/simd.h"

namespace retinar::RETINAR_ISA {

// A layer's keys and values [pages, slots, groups, dim]; int8 ones with a scale [pages, slots, groups].
template <typename T>
struct Cache {
  T* keys;
  T* values;
  float* key_scales;
  float* value_scales;
  std::int64_t page_slots;
  std::int64_t groups;
  std::int64_t dim;

  std::int64_t place(const std::int32_t* pages, std::int64_t slot) const {
    return (pages[slot / page_slots] * page_slots + slot % page_slots) * groups * dim;
  }
};

// Rotates neighbouring pairs by a position's angles [dim / 2, 2], in fp32.
inline void rotate(const float* x, const float* angles, float* out, std::int64_t dim) {
  for (std::int64_t i = 0; i < dim; i += 2) {
    out[i] = x[i] * angles[i] - x[i + 1] * angles[i + 1];
    out[i + 1] = x[i] * angles[i + 1] + x[i + 1] * angles[i];
  }
}

// The scales of one group in some slots, zeros behind them.
inline Vec slot_scales(const float* scales, const std::int64_t* places, std::int64_t slots, std::int64_t dim) {
  float lanes[Vec::width] = {};
  for (std::int64_t i = 0; i < slots; ++i) lanes[i] = scales[places[i] / dim];
  return load(lanes);
}

// A new key or value [dim] into its slot.
template <typename T>
inline void write(const float* x, T* cache, float*, std::int64_t place, std::int64_t dim) {
  for (std::int64_t i = 0; i < dim; ++i) cache[place + i] = from_float<T>(x[i]);
}

inline void write(const float* x, std::int8_t* cache, float* scales, std::int64_t place, std::int64_t dim) {
  float most = 0.0f;
  for (std::int64_t i = 0; i < dim; ++i) {
    const float size = x[i] < 0.0f ? -x[i] : x[i];
    most = size > most ? size : most;
  }
  const float factor = most > 0.0f ? 127.0f / most : 0.0f;
  for (std::int64_t i = 0; i < dim; ++i) {
    cache[place + i] = static_cast<std::int8_t>(static_cast<std::int32_t>(__builtin_rintf(x[i] * factor)));
  }
  scales[place / dim] = most / 127.0f;
}

// Scores of slots 0 to count for the ``ratio`` query heads of each group in [first, last): scores [heads][stride], and
// the outputs [heads][dim] fp32. Queries are turned and as many as the outputs. The order of all sums is fixed by the
// slots alone: not by pages, other heads or other rows.
template <typename T>
inline void attend(const Cache<T>& cache, const std::int32_t* pages, std::int64_t count, std::int64_t first,
                   std::int64_t last, std::int64_t ratio, const float* queries, float scale, float* scores,
                   std::int64_t stride, float* out) {
  constexpr std::int64_t step = Vec::width;
  const std::int64_t dim = cache.dim, whole = dim / step * step;
  std::int64_t places[step];
  for (std::int64_t start = 0; start < count; start += step) {
    const std::int64_t slots = count - start < step ? count - start : step;
    for (std::int64_t i = 0; i < slots; ++i) places[i] = cache.place(pages, start + i);
    for (std::int64_t group = first; group < last; ++group) {
      for (std::int64_t head = (group - first) * ratio; head < (group - first + 1) * ratio; ++head) {
        const float* query = queries + head * dim;
        Vec parts[step];
        for (std::int64_t i = 0; i < step; ++i) {
          Vec sum = broadcast(0.0f);
          if (i < slots) {
            const T* key = cache.keys + places[i] + group * dim;
            for (std::int64_t d = 0; d < whole; d += step) sum = fma(load(key + d), load(query + d), sum);
            if (whole < dim) {
              sum = fma(load_first(key + whole, dim - whole), load_first(query + whole, dim - whole), sum);
            }
          }
          parts[i] = sum;
        }
        Vec factor = broadcast(scale);
        if (sizeof(T) == 1) factor = factor * slot_scales(cache.key_scales + group, places, slots, dim);
        store(scores + head * stride + start, sums_of(parts) * factor);
      }
    }
  }
  const std::int64_t heads = (last - first) * ratio;
  for (std::int64_t head = 0; head < heads; ++head) {
    float* row = scores + head * stride;
    float top = row[0];
    for (std::int64_t i = 1; i < count; ++i) top = row[i] > top ? row[i] : top;
    Vec sum = broadcast(0.0f);
    for (std::int64_t start = 0; start < count; start += step) {
      const std::int64_t slots = count - start < step ? count - start : step;
      Vec weight = exp(load(row + start) - broadcast(top));
      if (slots < step) {
        float lanes[step];
        store(lanes, weight);
        for (std::int64_t i = slots; i < step; ++i) lanes[i] = 0.0f;
        weight = load(lanes);
      }
      store(row + start, weight);
      sum = sum + weight;
    }
    const float factor = 1.0f / retinar::RETINAR_ISA::sum(sum);
    for (std::int64_t start = 0; start < count; start += step) {
      store(row + start, load(row + start) * broadcast(factor));
    }
  }
  for (std::int64_t i = 0; i < heads * dim; ++i) out[i] = 0.0f;
  for (std::int64_t start = 0; start < count; start += step) {
    const std::int64_t slots = count - start < step ? count - start : step;
    for (std::int64_t i = 0; i < slots; ++i) places[i] = cache.place(pages, start + i);
    for (std::int64_t group = first; group < last; ++group) {
      const T* values = cache.values + group * dim;
      for (std::int64_t head = (group - first) * ratio; head < (group - first + 1) * ratio; ++head) {
        float* weights = scores + head * stride + start;
        if (sizeof(T) == 1) {
          store(weights, load(weights) * slot_scales(cache.value_scales + group, places, slots, dim));
        }
        float* target = out + head * dim;
        std::int64_t d = 0;
        for (; d + 4 * step <= dim; d += 4 * step) {
          Vec sum[4];
          for (int v = 0; v < 4; ++v) sum[v] = load(target + d + v * step);
          for (std::int64_t i = 0; i < slots; ++i) {
            const Vec weight = broadcast(weights[i]);
            for (int v = 0; v < 4; ++v) sum[v] = fma(load(values + places[i] + d + v * step), weight, sum[v]);
          }
          for (int v = 0; v < 4; ++v) store(target + d + v * step, sum[v]);
        }
        for (; d + step <= dim; d += step) {
          Vec sum = load(target + d);
          for (std::int64_t i = 0; i < slots; ++i) {
            sum = fma(load(values + places[i] + d), broadcast(weights[i]), sum);
          }
          store(target + d, sum);
        }
        if (d < dim) {
          Vec sum = load_first(target + d, dim - d);
          for (std::int64_t i = 0; i < slots; ++i) {
            sum = fma(load_first(values + places[i] + d, dim - d), broadcast(weights[i]), sum);
          }
          store_first(target + d, sum, dim - d);
        }
      }
    }
  }
}

}  // namespace retinar::RETINAR_ISA
