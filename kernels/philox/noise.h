// Philox4x32-10 and Gumbel noise (Salmon et al. 2011); for the kernels of every instruction set.
//
// Plain loops over blocks of words, which compilers turn into vectors; every lane runs the same operations, so the bits
// of a noise do not depend on its place. Logarithms are those of fp64: a noise is within a rounding of the exact one.
#pragma once

#include <cstdint>

namespace retinar::RETINAR_ISA {

constexpr int noise_quads = 16;
constexpr int noise_block = 4 * noise_quads;

// Words of the counters (first + i, position, index, domain): words[j][i] is word j of quad i.
inline void philox(std::uint32_t first, std::uint32_t position, std::uint32_t index, std::uint32_t domain,
                   std::uint64_t seed, std::uint32_t (&words)[4][noise_quads]) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int i = 0; i < noise_quads; ++i) {
    words[0][i] = first + static_cast<std::uint32_t>(i);
    words[1][i] = position;
    words[2][i] = index;
    words[3][i] = domain;
  }
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    for (int i = 0; i < noise_quads; ++i) {
      const std::uint64_t a = static_cast<std::uint64_t>(words[0][i]) * 0xD2511F53u;
      const std::uint64_t b = static_cast<std::uint64_t>(words[2][i]) * 0xCD9E8D57u;
      words[0][i] = static_cast<std::uint32_t>(b >> 32) ^ words[1][i] ^ key0;
      words[2][i] = static_cast<std::uint32_t>(a >> 32) ^ words[3][i] ^ key1;
      words[1][i] = static_cast<std::uint32_t>(b);
      words[3][i] = static_cast<std::uint32_t>(a);
    }
  }
}

// Natural logarithm of a positive normal number; relative error below 1e-12.
inline double natural_log(double x) {
  const std::uint64_t bits = __builtin_bit_cast(std::uint64_t, x);
  // The exponent that leaves a mantissa between sqrt(1/2) and sqrt(2).
  const std::uint64_t shifted = bits - 0x3FE6A09E667F3BCDull;
  const std::uint64_t mantissa_bits = bits - (shifted & 0xFFF0000000000000ull);
  const double m = __builtin_bit_cast(double, mantissa_bits);
  // The exponent, a signed 12-bit number, by way of the low bits of a large fp64 number: conversions from 64-bit integers
  // have no vector instruction everywhere.
  const std::uint64_t biased = 0x4330000000000000ull | (((shifted >> 52) + 0x800) & 0xFFF);
  const double exponent = __builtin_bit_cast(double, biased) - (4503599627370496.0 + 2048.0);
  const double f = (m - 1.0) / (m + 1.0), s = f * f;
  double p = 1.0 / 17.0;
  p = p * s + 1.0 / 15.0;
  p = p * s + 1.0 / 13.0;
  p = p * s + 1.0 / 11.0;
  p = p * s + 1.0 / 9.0;
  p = p * s + 1.0 / 7.0;
  p = p * s + 1.0 / 5.0;
  p = p * s + 1.0 / 3.0;
  return exponent * 0.693147180559945309417 + 2.0 * (f + f * s * p);
}

// -log(-log1p(-x)), where x = min((word + 0.5) * 2^-32, 1 - 2^-24) in fp32.
inline float gumbel(std::uint32_t word) {
  float x = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  x = x < 1.0f - 0x1p-24f ? x : 1.0f - 0x1p-24f;
  // Kahan: 1 - x is rounded, and so is the denominator, by the same amount.
  const double u = 1.0 - static_cast<double>(x);
  const double log1p = natural_log(u) * (static_cast<double>(x) / (1.0 - u));
  return static_cast<float>(-natural_log(-log1p));
}

// Noise of the codes 4 * first_quad and the noise_block - 1 after it.
inline void gumbel_noise(std::uint32_t first_quad, std::uint32_t position, std::uint32_t index, std::uint32_t domain,
                         std::uint64_t seed, float (&noise)[noise_block]) {
  std::uint32_t words[4][noise_quads];
  philox(first_quad, position, index, domain, seed, words);
  float by_word[4][noise_quads];
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < noise_quads; ++i) by_word[j][i] = gumbel(words[j][i]);
  }
  for (int i = 0; i < noise_quads; ++i) {
    for (int j = 0; j < 4; ++j) noise[4 * i + j] = by_word[j][i];
  }
}

}  // namespace retinar::RETINAR_ISA
