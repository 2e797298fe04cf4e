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
  scales[place / dim] = to_int8(x, cache + place, dim, 0);
}

// Asks for one group's numbers of the slots at ``places``, some steps before they are wanted: a row's slots are a few
// kilobytes apart, which no processor guesses.
template <typename T>
inline void prefetch(const T* cache, const std::int64_t* places, std::int64_t slots, std::int64_t dim) {
  for (std::int64_t i = 0; i < slots; ++i) {
    const char* first = reinterpret_cast<const char*>(cache + places[i]);
    for (std::int64_t byte = 0; byte < dim * static_cast<std::int64_t>(sizeof(T)); byte += 64) {
      __builtin_prefetch(first + byte, 0, 2);
    }
  }
}

// The slots of one step, and those of the next.
struct Places {
  std::int64_t now[Vec::width], next[Vec::width];
  std::int64_t slots, next_slots;

  template <typename T>
  void move(const Cache<T>& cache, const std::int32_t* pages, std::int64_t start, std::int64_t count) {
    if (start == 0) find(cache, pages, 0, count, next, next_slots);
    for (std::int64_t i = 0; i < Vec::width; ++i) now[i] = next[i];
    slots = next_slots;
    find(cache, pages, start + Vec::width, count, next, next_slots);
  }

 private:
  template <typename T>
  static void find(const Cache<T>& cache, const std::int32_t* pages, std::int64_t start, std::int64_t count,
                   std::int64_t* places, std::int64_t& slots) {
    slots = count - start < Vec::width ? count - start : Vec::width;
    if (slots < 0) slots = 0;
    for (std::int64_t i = 0; i < Vec::width; ++i) places[i] = i < slots ? cache.place(pages, start + i) : 0;
  }
};

// Vectors of a head dim that are summed in registers; wider ones, and what is left of odd ones, go by way of memory.
constexpr std::int64_t head_vectors = 64 / Vec::width;

template <typename T>
inline Vec dot(const T* key, const float* query, std::int64_t dim) {
  Vec sum = broadcast(0.0f);
  std::int64_t d = 0;
  for (; d + Vec::width <= dim; d += Vec::width) sum = fma(load(key + d), load(query + d), sum);
  if (d < dim) sum = fma(load_first(key + d, dim - d), load_first(query + d, dim - d), sum);
  return sum;
}

template <typename T>
inline void add_weighted(const T* values, const Places& places, const float* weights, float* out, std::int64_t dim) {
  std::int64_t d = 0;
  for (; d + head_vectors * Vec::width <= dim; d += head_vectors * Vec::width) {
    Vec sum[head_vectors];
    for (int v = 0; v < head_vectors; ++v) sum[v] = load(out + d + v * Vec::width);
    for (std::int64_t i = 0; i < places.slots; ++i) {
      const Vec weight = broadcast(weights[i]);
      const T* value = values + places.now[i] + d;
      for (int v = 0; v < head_vectors; ++v) sum[v] = fma(load(value + v * Vec::width), weight, sum[v]);
    }
    for (int v = 0; v < head_vectors; ++v) store(out + d + v * Vec::width, sum[v]);
  }
  for (; d + Vec::width <= dim; d += Vec::width) {
    Vec sum = load(out + d);
    for (std::int64_t i = 0; i < places.slots; ++i) {
      sum = fma(load(values + places.now[i] + d), broadcast(weights[i]), sum);
    }
    store(out + d, sum);
  }
  if (d < dim) {
    Vec sum = load_first(out + d, dim - d);
    for (std::int64_t i = 0; i < places.slots; ++i) {
      sum = fma(load_first(values + places.now[i] + d, dim - d), broadcast(weights[i]), sum);
    }
    store_first(out + d, sum, dim - d);
  }
}

// exp(x - top) over their sum, in place, for x [count]; zeros up to the next whole vector.
inline void softmax(float* x, std::int64_t count) {
  float top = x[0];
  for (std::int64_t i = 1; i < count; ++i) top = x[i] > top ? x[i] : top;
  Vec total = broadcast(0.0f);
  for (std::int64_t start = 0; start < count; start += Vec::width) {
    Vec weight = exp(load(x + start) - broadcast(top));
    if (count - start < Vec::width) {
      store(x + start, weight);
      weight = load_first(x + start, count - start);
    }
    store(x + start, weight);
    total = total + weight;
  }
  const Vec factor = broadcast(1.0f / sum(total));
  for (std::int64_t start = 0; start < count; start += Vec::width) store(x + start, load(x + start) * factor);
}

// Attention of ``ratio`` query heads for each group in [first, last) over the slots 0 to count: queries, turned, and out
// [heads][dim] fp32; scores [heads][stride] is scratch. The order of all sums is fixed by the slots alone: not by pages,
// other heads or other rows.
template <typename T>
inline void attend(const Cache<T>& cache, const std::int32_t* pages, std::int64_t count, std::int64_t first,
                   std::int64_t last, std::int64_t ratio, const float* queries, float scale, float* scores,
                   std::int64_t stride, float* out) {
  const std::int64_t dim = cache.dim, heads = (last - first) * ratio;
  Places places;
  for (std::int64_t start = 0; start < count; start += Vec::width) {
    places.move(cache, pages, start, count);
    for (std::int64_t group = first; group < last; ++group) {
      const T* keys = cache.keys + group * dim;
      prefetch(keys, places.next, places.next_slots, dim);
      Vec factor = broadcast(scale);
      if (sizeof(T) == 1) factor = factor * slot_scales(cache.key_scales + group, places.now, places.slots, dim);
      for (std::int64_t head = (group - first) * ratio; head < (group - first + 1) * ratio; ++head) {
        Vec parts[Vec::width];
        if (places.slots == Vec::width) {
          for (int i = 0; i < Vec::width; ++i) parts[i] = dot(keys + places.now[i], queries + head * dim, dim);
        } else {
          for (int i = 0; i < Vec::width; ++i) {
            parts[i] = i < places.slots ? dot(keys + places.now[i], queries + head * dim, dim) : broadcast(0.0f);
          }
        }
        store(scores + head * stride + start, sums_of(parts) * factor);
      }
    }
  }
  for (std::int64_t head = 0; head < heads; ++head) softmax(scores + head * stride, count);
  for (std::int64_t i = 0; i < heads * dim; ++i) out[i] = 0.0f;
  for (std::int64_t start = 0; start < count; start += Vec::width) {
    places.move(cache, pages, start, count);
    for (std::int64_t group = first; group < last; ++group) {
      const T* values = cache.values + group * dim;
      prefetch(values, places.next, places.next_slots, dim);
      for (std::int64_t head = (group - first) * ratio; head < (group - first + 1) * ratio; ++head) {
        float* weights = scores + head * stride + start;
        if (sizeof(T) == 1) {
          store(weights, load(weights) * slot_scales(cache.value_scales + group, places.now, places.slots, dim));
        }
        add_weighted(values, places, weights, out + head * dim, dim);
      }
    }
  }
}

}  // namespace retinar::RETINAR_ISA
