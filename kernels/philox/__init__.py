"""Counter-based random numbers: the same counter and key give the same words, in any order, on any implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.dispatch import same_device
from retinar.kernels.philox import reference
from retinar.kernels.philox.reference import DOMAIN_ATTENTION, DOMAIN_SAMPLE

__all__ = ["DOMAIN_ATTENTION", "DOMAIN_SAMPLE", "gumbel_noise", "philox4x32", "seed_tensor"]


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast against one another and against the key; their low 32 bits count.
        key: 64 bits, low word first: an int in [0, 2^64), or an int64 tensor holding those bits.

    Returns:
        Four int64 tensors of 32-bit words, broadcast to the common shape.

    Raises:
        ValueError: a counter that is not four int64 tensors, or a key that is out of range.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"; checked against Random123's answers.
    """
    if len(counter) != 4 or any(word.dtype != torch.int64 for word in counter):
        raise ValueError(f"philox4x32: expected four int64 counters, found {[word.dtype for word in counter]}")
    same_device("philox4x32", *counter)
    return reference.philox4x32(counter, seed_tensor(key, counter[0].device))


def gumbel_noise(
    seed_I: Tensor, index_I: Tensor, position_I: Tensor, vocabulary: int, domain: int = DOMAIN_SAMPLE
) -> Tensor:
    """Standard Gumbel noise for one draw of each image.

    With word = philox(counter = (code // 4, position, image index, domain), key = seed)[code % 4] and
    ``x = min((word + 0.5) * 2^-32, 1 - 2^-24)`` in fp32, the noise of a code is ``-log(-log1p(-x))``.

    Args:
        seed_I: int64 [I], the 64-bit seeds.
        index_I: integer [I], the images' indices; position_I: integer [I], the codes' positions; low 32 bits count.
        vocabulary: V >= 1.
        domain: last counter word, so that other uses of a seed draw other numbers.

    Returns:
        fp32 [I, V], finite, in [-2.9, 22.9]. The bits of a row depend on that row's arguments alone.
    """
    if vocabulary < 1:
        raise ValueError(f"gumbel_noise: expected a vocabulary of at least 1, found {vocabulary}")
    if seed_I.dtype != torch.int64 or not seed_I.shape == index_I.shape == position_I.shape or seed_I.dim() != 1:
        raise ValueError(
            f"gumbel_noise: expected int64 seeds and integer indices and positions of one length, found "
            f"{seed_I.dtype} {tuple(seed_I.shape)}, {tuple(index_I.shape)}, {tuple(position_I.shape)}"
        )
    same_device("gumbel_noise", seed_I, index_I, position_I)
    return reference.gumbel_noise(seed_I, index_I, position_I, vocabulary, domain)


def seed_tensor(seed: Tensor | int, device: torch.device | None = None) -> Tensor:
    """A 64-bit seed as the int64 scalar with the same bits; tensors pass through."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise ValueError(f"expected the seed as int64, found {seed.dtype}")
        return seed
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"expected a seed from 0 to 2^64 - 1, found {seed}")
    return torch.tensor(seed - (1 << 64) if seed >> 63 else seed, dtype=torch.int64, device=device)
