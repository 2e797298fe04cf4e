// Vectors of fp32 for the kernels: one source, compiled once for each instruction set (RETINAR_ISA names it).
//
// Everything lives in a namespace of the instruction set and uses no templates or inline functions of the standard
// library: the linker keeps one copy of such a function for the whole module, and it could be the AVX-512 one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace retinar::RETINAR_ISA {

// bfloat16 as it lies in memory.
struct BFloat16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(std::int8_t x) { return static_cast<float>(x); }

inline float to_float(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// To nearest, ties to even; NaN stays a (quiet) NaN. The same bits as torch's conversion for every other value.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7FC0};
  return {static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// a * 2^n for whole numbers n from -126 to 127.
inline Vec scale(Vec a, Vec n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(exponent))};
}
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }

inline Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

inline void store(BFloat16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Vec scale(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }

inline Vec load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}

inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else

// Plain loops of a fixed width: compilers turn them into SSE or NEON.
struct Vec {
  static constexpr int width = 8;
  float v[width];
};

inline Vec broadcast(float x) {
  Vec out;
  for (float& lane : out.v) lane = x;
  return out;
}

inline Vec operator*(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] *= b.v[i];
  return a;
}

inline Vec operator+(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] += b.v[i];
  return a;
}

inline Vec operator-(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] -= b.v[i];
  return a;
}

inline Vec operator/(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] /= b.v[i];
  return a;
}

inline Vec max(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

inline Vec min(Vec a, Vec b) {
  for (int i = 0; i < Vec::width; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}

// To nearest, ties to even, for magnitudes below 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
inline Vec round(Vec a) {
  for (float& lane : a.v) {
    volatile float shifted = lane + 12582912.0f;
    lane = shifted - 12582912.0f;
  }
  return a;
}

inline Vec scale(Vec a, Vec n) {
  for (int i = 0; i < Vec::width; ++i) {
    const std::int32_t whole = n.v[i] == n.v[i] ? static_cast<std::int32_t>(n.v[i]) : 0;
    const std::uint32_t bits = static_cast<std::uint32_t>(whole + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    a.v[i] *= power;
  }
  return a;
}

// Two roundings: a fused one would be a library call on processors without the instruction.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

template <typename T>
inline Vec load(const T* p) {
  Vec out;
  for (int i = 0; i < Vec::width; ++i) out.v[i] = to_float(p[i]);
  return out;
}

template <typename T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < Vec::width; ++i) p[i] = from_float<T>(a.v[i]);
}

#endif

// Products of bfloat16 weights, two neighbours in k at a time: a column's weights lie in pairs. With the processor's own
// instruction the activations are bfloat16 too; without it they are the same numbers in fp32.
#if defined(__AVX512BF16__)

using Activation = BFloat16;

inline Vec dot_pairs(const BFloat16* weights, const Activation* x, Vec sum) {
  std::int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  const __m512i w = _mm512_loadu_si512(weights);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair))};
}

#else

using Activation = float;

#if defined(__AVX512F__)
inline Vec low(const BFloat16* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Vec high(const BFloat16* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)))};
}
#elif defined(__AVX2__)
inline Vec low(const BFloat16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16))};
}
inline Vec high(const BFloat16* p) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_and_si256(all, _mm256_set1_epi32(-65536)))};
}
#else
inline Vec low(const BFloat16* p) {
  Vec out;
  for (int i = 0; i < Vec::width; ++i) out.v[i] = to_float(p[2 * i]);
  return out;
}
inline Vec high(const BFloat16* p) {
  Vec out;
  for (int i = 0; i < Vec::width; ++i) out.v[i] = to_float(p[2 * i + 1]);
  return out;
}
#endif

inline Vec dot_pairs(const BFloat16* weights, const Activation* x, Vec sum) {
  return fma(high(weights), broadcast(x[1]), fma(low(weights), broadcast(x[0]), sum));
}

#endif

// Exact sums of products of int8 weights, four neighbours in k at a time, with int8 activations.
#if defined(__AVX512VNNI__)

using Quantised = std::uint8_t;  // the number plus 128: the instruction takes one factor unsigned
constexpr int quantised_zero = 128;

struct IntSum {
  __m512i v;
};

inline IntSum dot_quads(const std::int8_t* weights, const Quantised* x, IntSum sum) {
  std::int32_t quad;
  std::memcpy(&quad, x, sizeof quad);
  return {_mm512_dpbusd_epi32(sum.v, _mm512_set1_epi32(quad), _mm512_loadu_si512(weights))};
}

inline Vec total(IntSum sum, const std::int32_t* column_sums) {
  const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(column_sums), 7);
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(sum.v, excess))};
}

#else

using Quantised = std::int16_t;
constexpr int quantised_zero = 0;

#if defined(__AVX512F__)

// Two sums a column, of even and odd pairs: of the first 8 columns and of the others.
struct IntSum {
  __m512i low, high;
};

inline IntSum dot_quads(const std::int8_t* weights, const Quantised* x, IntSum sum) {
  std::int64_t quad;
  std::memcpy(&quad, x, sizeof quad);
  const __m512i factor = _mm512_set1_epi64(quad);
  const auto* w = reinterpret_cast<const __m256i*>(weights);
  const __m512i low = _mm512_cvtepi8_epi16(_mm256_loadu_si256(w));
  const __m512i high = _mm512_cvtepi8_epi16(_mm256_loadu_si256(w + 1));
  return {_mm512_add_epi32(sum.low, _mm512_madd_epi16(low, factor)),
          _mm512_add_epi32(sum.high, _mm512_madd_epi16(high, factor))};
}

inline Vec total(IntSum sum, const std::int32_t*) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(sum.low, even, sum.high),
                                              _mm512_permutex2var_epi32(sum.low, odd, sum.high)))};
}

#elif defined(__AVX2__)

struct IntSum {
  __m256i low, high;  // of the first 4 columns and of the others
};

inline IntSum dot_quads(const std::int8_t* weights, const Quantised* x, IntSum sum) {
  std::int64_t quad;
  std::memcpy(&quad, x, sizeof quad);
  const __m256i factor = _mm256_set1_epi64x(quad);
  const auto* w = reinterpret_cast<const __m128i*>(weights);
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(w)), factor)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(w + 1)), factor))};
}

inline Vec total(IntSum sum, const std::int32_t*) {
  // hadd works on halves: columns 0 1 4 5 | 2 3 6 7
  const __m256i pairs = _mm256_hadd_epi32(sum.low, sum.high);
  return {_mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7)))};
}

#else

struct IntSum {
  std::int32_t v[Vec::width];
};

inline IntSum dot_quads(const std::int8_t* weights, const Quantised* x, IntSum sum) {
  for (int i = 0; i < Vec::width; ++i) {
    for (int j = 0; j < 4; ++j) sum.v[i] += weights[4 * i + j] * x[j];
  }
  return sum;
}

inline Vec total(IntSum sum, const std::int32_t*) {
  Vec out;
  for (int i = 0; i < Vec::width; ++i) out.v[i] = static_cast<float>(sum.v[i]);
  return out;
}

#endif
#endif

// int8 numbers as fp32.
#if defined(__AVX512F__)
inline Vec load(const std::int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
#elif defined(__AVX2__)
inline Vec load(const std::int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
#endif

// exp, of x between -87 and 88 (beyond: as at the end); relative error below 2^-22. One polynomial for all lanes and no scalar tail: the bits of
// a lane do not depend on its place.
inline Vec exp(Vec x) {
  // x last in both: the processor's minimum and maximum give their second number where one is none
  const Vec clipped = min(broadcast(88.0f), max(broadcast(-87.0f), x));
  const Vec n = round(clipped * broadcast(1.44269504f));
  // x - n ln 2 in two parts: the first has 9 bits, so its product with n is exact
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), clipped));
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return scale(fma(p, r * r, r + broadcast(1.0f)), n);
}

// The first count lanes from memory, zeros in the others.
template <typename T>
inline Vec load_first(const T* p, std::int64_t count) {
  T lanes[Vec::width] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T>
inline void store_first(T* p, Vec a, std::int64_t count) {
  T lanes[Vec::width];
  store(lanes, a);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// The lanes' sum in one fixed order, halving: lane i with lane i + width/2, and so on.
inline float sum(Vec a) {
  float lanes[Vec::width];
  store(lanes, a);
  for (int half = Vec::width / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Lane i of the result is the sum of the lanes of parts[i], of which there are Vec::width. The order of the additions is
// the same for every lane.
inline Vec sums_of(const Vec* parts) {
#if defined(__AVX512F__)
  __m512 a[8], b[4], c[2];
  // Each step adds the halves of two vectors; what belongs to one stays together, so the lanes end up in bit order.
  for (int i = 0; i < 8; ++i) {
    const __m512 x = parts[i].v, y = parts[i + 8].v;
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 x = a[i], y = a[i + 4];
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 x = b[i], y = b[i + 2];
    c[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xEE));
  }
  const __m512 d = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xDD));
  // d holds part 8a+4b+2c+d' at the lane that the shuffles lead to
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), d)};
#else
  Vec out = broadcast(0.0f);
  float lanes[Vec::width];
  for (int i = 0; i < Vec::width; ++i) lanes[i] = sum(parts[i]);
  out = load(lanes);
  return out;
#endif
}

// The largest magnitude of some numbers.
inline float largest(const float* x, std::int64_t count) {
  Vec most = broadcast(0.0f);
  std::int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) {
    const Vec value = load(x + i);
    most = max(most, max(value, broadcast(0.0f) - value));
  }
  float lanes[Vec::width];
  store(lanes, most);
  for (; i < count; ++i) {
    const float size = x[i] < 0.0f ? -x[i] : x[i];
    lanes[0] = size > lanes[0] ? size : lanes[0];
  }
  for (float lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
  return lanes[0];
}

// Rounds numbers to int8 with one scale, plus ``zero``; the scale. NaN where a number is none: it is not to get lost.
template <typename Out>
inline float to_int8(const float* x, Out* out, std::int64_t count, int zero) {
  const float most = largest(x, count);
  const float factor = most > 0x1p-120f ? 127.0f / most : 0.0f;
  bool whole = true;
  for (std::int64_t i = 0; i < count; ++i) {
    const float scaled = __builtin_rintf(x[i] * factor);
    const bool inside = scaled >= -127.0f && scaled <= 127.0f;
    whole &= inside;
    out[i] = static_cast<Out>(static_cast<std::int32_t>(inside ? scaled : 0.0f) + zero);
  }
  return whole ? most / 127.0f : __builtin_nanf("");
}

// Rounds to T and back: a value that a kernel keeps in registers gets the precision that T would have in memory.
template <typename T>
inline Vec round_to(Vec a) {
  T memory[Vec::width];
  store(memory, a);
  return load(memory);
}

template <>
inline Vec round_to<float>(Vec a) {
  return a;
}

}  // namespace retinar::RETINAR_ISA
