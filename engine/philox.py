"""The random numbers of one image: a stream named by (seed, index), with no state to carry or to lose.

Every draw reads Philox4x32-10 at the counter (code / 4, position, image index, domain) under the 64-bit seed as key
(Salmon et al., SC'11), so an image's noise does not depend on who else is in the batch, on the order, or on the
process. The generator itself is `retinar.kernels.ops`; this file only names the stream and checks its range.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.kernels import ops

SEEDS = 1 << 64
INDICES = 1 << 32


@dataclass(frozen=True, slots=True)
class Stream:
    """The stream of one image: ``seed`` is the Philox key, ``index`` the third counter word."""

    seed: int
    index: int

    @property
    def seed_word(self) -> int:
        """The seed's 64 bits as a signed integer, which is how int64 tensors carry them."""
        return self.seed - SEEDS if self.seed >= SEEDS // 2 else self.seed

    def noise(self, position: int, vocabulary: int) -> Tensor:
        """Gumbel noise [vocabulary] fp32 of the draw at ``position``; the code drawn is argmax(filtered logit +
        noise).
        """
        word = torch.tensor([self.seed_word], dtype=torch.int64)
        index = torch.tensor([self.index], dtype=torch.int64)
        return ops.gumbel_noise(word, index, torch.tensor([position], dtype=torch.int32), vocabulary)[0]


def stream(seed: int, index: int) -> Stream:
    """A checked stream; InputError outside 64 bits of seed or 32 bits of index (the counter's width)."""
    for name, value in (("seed", seed), ("image index", index)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(f"the {name} must be a whole number, got {value!r}; give one")
    if not 0 <= seed < SEEDS:
        raise InputError(f"the seed must lie between 0 and 2^64 - 1, got {seed}; choose another seed")
    if not 0 <= index < INDICES:
        raise InputError(
            f"an image index must lie between 0 and 2^32 - 1, got {index}; use another seed for more images"
        )
    return Stream(int(seed), int(index))
