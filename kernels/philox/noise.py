"""The random numbers inside Triton kernels: the words, and the Gumbel noise of neighbouring codes.

Philox itself is Triton's. The logarithm is our own: Triton's interpreter has no ``log1p``, and what runs there should
be what runs on a GPU. Over all 84 million x that a word can give, the noise is within 2 ulp of the reference's, with
multiply-adds rounded once (a GPU) or twice (the interpreter); an ulp counts at least 2^-24, as an ulp of the inner
logarithm is an absolute 2^-24 or more in the noise.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

#: Bits of 2/3: mantissas are taken from [2/3, 4/3), where the logarithm of an exact f = mantissa - 1 is a short series.
TWO_THIRDS = tl.constexpr(0x3F2AAAAB)
#: log(2) in two parts. The first has 16 bits: its multiples by exponents are exact.
LN2_HIGH, LN2_LOW = tl.constexpr(45426 / 65536), tl.constexpr(1.4286068e-06)
LARGEST = tl.constexpr(1 - 2.0**-24)


@triton.jit
def words(quad, position, index, seed, DOMAIN: tl.constexpr):
    """Philox4x32-10: uint32 tiles of the words for codes 4q, 4q + 1, 4q + 2 and 4q + 3; the rest are scalars."""
    quad = quad.to(tl.uint32)
    zero = quad ^ quad  # Triton's philox wants counters of one shape
    domain = tl.full(quad.shape, DOMAIN, tl.uint32)
    return tl.philox(seed, quad, position.to(tl.uint32) + zero, index.to(tl.uint32) + zero, domain)


@triton.jit
def _logarithm(f, exponent):
    """log((1 + f) 2^exponent) for f in [-1/3, 1/3]: below 0.94 ulp.

    The polynomial is (log(1 + f) - f) / f^2, fitted to a relative error of 5e-9 of the logarithm. Here and below,
    products that are added are exact or in a `tl.fma`: what the compiler contracts changes no bit.
    """
    q = tl.fma(f, -0.12948957085609436, 0.1400475800037384)
    q = tl.fma(f, q, -0.12167155742645264)
    q = tl.fma(f, q, 0.14001160860061646)
    q = tl.fma(f, q, -0.16682305932044983)
    q = tl.fma(f, q, 0.20010747015476227)
    q = tl.fma(f, q, -0.24999716877937317)
    q = tl.fma(f, q, 0.3333320915699005)
    q = tl.fma(f, q, -0.5)
    exponent = exponent.to(tl.float32)
    high = exponent * LN2_HIGH
    total = high + f
    lost = f - (total - high)  # exactly what the sum lost: |high| >= log(2) > |f|, or high is 0
    return total + (lost + tl.fma(f * f, q, exponent * LN2_LOW))


@triton.jit
def _reduced(u):
    """(exponent, 2^-exponent) that bring u > 0 into [2/3, 4/3)."""
    exponent = (u.to(tl.int32, bitcast=True) - TWO_THIRDS) >> 23
    return exponent, ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def noise(word):
    """-log(-log1p(-x)) of ``x = min((word + 0.5) * 2^-32, 1 - 2^-24)``."""
    x = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, LARGEST)
    exponent, scale = _reduced(1.0 - x)
    # (1 - x) scale - 1 without rounding: 1 - x itself would lose the bits of a small x, which come with scale = 1.
    exponential = -_logarithm((scale - 1.0) - x * scale, exponent)
    exponent, scale = _reduced(exponential)
    return -_logarithm(exponential * scale - 1.0, exponent)


@triton.jit
def gumbel(start, position, index, seed, DOMAIN: tl.constexpr, CODES: tl.constexpr):
    """fp32 [CODES]: the noise of codes from ``start``, a multiple of 4, on."""
    quad = start // 4 + tl.arange(0, CODES // 4)
    w0, w1, w2, w3 = words(quad, position, index, seed, DOMAIN)
    return noise(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
