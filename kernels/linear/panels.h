// The product of some rows with some units of columns, in registers; for the kernels of every instruction set.
#pragma once

#include "linear/cpu.h"
#include "native/simd.h"

namespace retinar::RETINAR_ISA {

// Vectors of a unit of 16 columns, and how many units and rows are held in registers at once.
constexpr int unit_vectors = static_cast<int>(unit_columns) / Vec::width;
#if defined(__AVX512F__)
constexpr int most_units = 4, most_rows = 6;  // 24 of 32 registers
#else
constexpr int most_units = 2, most_rows = 2;  // 8 of 16
#endif

// Rows of activations as the products want them: fp32; Activation for bfloat16 weights; Quantised for int8 ones, with a
// scale a row.
struct Rows {
  const void* data;
  std::int64_t stride;  // elements; at least the packed K, whose padding is zero
  const float* scales;
};

// The sums of R rows and U units over all of K, one accumulator each, in the order of k: the bits of a sum depend on
// its own row and column alone.
template <int R, int U>
inline void sums(const float* weights, std::int64_t steps, const float* x, std::int64_t stride, Vec (&sum)[R][U * unit_vectors]) {
  for (std::int64_t k = 0; k < steps; ++k, weights += panel_columns) {
    Vec w[U * unit_vectors];
    for (int v = 0; v < U * unit_vectors; ++v) w[v] = load(weights + v * Vec::width);
    for (int r = 0; r < R; ++r) {
      const Vec value = broadcast(x[r * stride + k]);
      for (int v = 0; v < U * unit_vectors; ++v) sum[r][v] = fma(w[v], value, sum[r][v]);
    }
  }
}

template <int R, int U>
inline void sums(const BFloat16* weights, std::int64_t steps, const Activation* x, std::int64_t stride,
                 Vec (&sum)[R][U * unit_vectors]) {
  for (std::int64_t k = 0; k < steps; ++k, weights += 2 * panel_columns) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < U * unit_vectors; ++v) {
        sum[r][v] = dot_pairs(weights + v * 2 * Vec::width, x + r * stride + 2 * k, sum[r][v]);
      }
    }
  }
}

template <int R, int U>
inline void sums(const std::int8_t* weights, std::int64_t steps, const Quantised* x, std::int64_t stride,
                 IntSum (&sum)[R][U * unit_vectors]) {
  for (std::int64_t k = 0; k < steps; ++k, weights += 4 * panel_columns) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < U * unit_vectors; ++v) {
        sum[r][v] = dot_quads(weights + v * 4 * Vec::width, x + r * stride + 4 * k, sum[r][v]);
      }
    }
  }
}

template <int R, int U, typename Finish>
inline void block(const Packed& matrix, const std::int8_t* weights, const Quantised* x, const Rows& rows,
                  std::int64_t row, std::int64_t unit, Finish& finish) {
  IntSum sum[R][U * unit_vectors];
  for (int r = 0; r < R; ++r) {
    for (IntSum& each : sum[r]) each = IntSum{};
  }
  sums<R, U>(weights, matrix.steps(), x + row * rows.stride, rows.stride, sum);
  for (int r = 0; r < R; ++r) {
    Vec scaled[U * unit_vectors];
    for (int v = 0; v < U * unit_vectors; ++v) {
      const std::int64_t column = unit * unit_columns + v * Vec::width;
      const Vec scale = load(matrix.scales() + column) * broadcast(rows.scales[row + r]);
      scaled[v] = total(sum[r][v], matrix.sums() + column) * scale;
    }
    for (int u = 0; u < U; ++u) finish(row + r, unit + u, scaled + u * unit_vectors);
  }
}

// Calls finish(row, unit, sums of one unit) for R rows and U units from ``unit`` on, all in one panel.
template <int R, int U, typename W, typename X, typename Finish>
inline void block(const Packed& matrix, const W* weights, const X* x, const Rows& rows, std::int64_t row,
                  std::int64_t unit, Finish& finish) {
  Vec sum[R][U * unit_vectors];
  for (int r = 0; r < R; ++r) {
    for (Vec& each : sum[r]) each = broadcast(0.0f);
  }
  sums<R, U>(weights, matrix.steps(), x + row * rows.stride, rows.stride, sum);
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) finish(row + r, unit + u, sum[r] + u * unit_vectors);
  }
}

template <int U, typename W, typename X, typename Finish>
inline void all_rows(const Packed& matrix, const X* x, const Rows& rows, std::int64_t count, std::int64_t unit,
                     Finish& finish) {
  const std::int64_t column = unit * unit_columns;
  const W* weights = static_cast<const W*>(matrix.data) + column / panel_columns * matrix.panel_elements() +
                     column % panel_columns * matrix.step();
  std::int64_t row = 0;
  for (; row + most_rows <= count; row += most_rows) {
    block<most_rows, U>(matrix, weights, x, rows, row, unit, finish);
  }
  switch (count - row) {
    case 1: block<1, U>(matrix, weights, x, rows, row, unit, finish); break;
#if defined(__AVX512F__)
    case 2: block<2, U>(matrix, weights, x, rows, row, unit, finish); break;
    case 3: block<3, U>(matrix, weights, x, rows, row, unit, finish); break;
    case 4: block<4, U>(matrix, weights, x, rows, row, unit, finish); break;
    case 5: block<5, U>(matrix, weights, x, rows, row, unit, finish); break;
#endif
  }
}

template <typename W, typename X, typename Finish>
inline void units(const Packed& matrix, const X* x, const Rows& rows, std::int64_t count, std::int64_t first,
                  std::int64_t last, Finish& finish) {
  constexpr std::int64_t in_panel = panel_columns / unit_columns;
  for (std::int64_t unit = first; unit < last;) {
    const std::int64_t left = (unit / in_panel + 1) * in_panel - unit;
    const std::int64_t rest = left < last - unit ? left : last - unit;
#if defined(__AVX512F__)
    if (rest >= 4) {
      all_rows<4, W>(matrix, x, rows, count, unit, finish);
      unit += 4;
      continue;
    }
#endif
    if (rest >= 2) {
      all_rows<2, W>(matrix, x, rows, count, unit, finish);
      unit += 2;
    } else {
      all_rows<1, W>(matrix, x, rows, count, unit, finish);
      unit += 1;
    }
  }
}

// finish(row, unit, sums): the fp32 sums of ``count`` rows with the units [first, last), unit_vectors vectors each.
// Weights are read from memory once; the rows after the first few find them in the cache.
template <typename Finish>
inline void multiply(const Packed& matrix, const Rows& rows, std::int64_t count, std::int64_t first, std::int64_t last,
                     Finish&& finish) {
  switch (matrix.kind) {
    case Kind::float32:
      return units<float>(matrix, static_cast<const float*>(rows.data), rows, count, first, last, finish);
    case Kind::bfloat16:
      return units<BFloat16>(matrix, static_cast<const Activation*>(rows.data), rows, count, first, last, finish);
    case Kind::int8:
      return units<std::int8_t>(matrix, static_cast<const Quantised*>(rows.data), rows, count, first, last, finish);
  }
}

}  // namespace retinar::RETINAR_ISA
