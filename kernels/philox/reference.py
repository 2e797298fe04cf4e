"""Philox4x32-10 (Salmon et al., 2011) and the Gumbel noise that is made of its words.

torch has no unsigned 32-bit arithmetic worth the name, so words live in int64; products wrap modulo 2^64, which keeps
both halves of a 32 x 32 bit product right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.numerics import lanewise

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
#: The last counter word separates the uses of one seed.
DOMAIN_SAMPLE, DOMAIN_ATTENTION = 0, 1
#: torch runs log and log1p on one thread below this many elements.
VECTOR_MATH_GRAIN = 2048


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words per counter. The four counters and the key broadcast; the first rounds run on unbroadcast shapes."""
    c0, c1, c2, c3 = (word & MASK for word in counter)
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK) ^ c1 ^ k0,
            product1 & MASK,
            ((product0 >> 32) & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """A word to (0, 1) in fp32: float(word) rounded to nearest, plus a half, times 2^-32, at most 1 - 2^-24."""
    return ((word.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel_noise(seed_I: Tensor, index_I: Tensor, position_I: Tensor, vocabulary: int, domain: int) -> Tensor:
    """-log(-log1p(-x)): the large noises, which decide a draw, come from small x, where fp32 is fine-grained."""
    quads = torch.arange(-(-vocabulary // 4), device=seed_I.device).unsqueeze(0)
    position, index, seed = (t.to(torch.int64).unsqueeze(1) for t in (position_I, index_I, seed_I))
    words = philox4x32((quads, position, index, torch.full_like(index, domain)), seed)
    x_IV = torch.stack([uniform(word) for word in words], -1).flatten(1)[:, :vocabulary]
    exponential = lanewise(torch.log1p, x_IV.neg(), VECTOR_MATH_GRAIN).neg_()
    return lanewise(torch.log, exponential, VECTOR_MATH_GRAIN).neg_()
