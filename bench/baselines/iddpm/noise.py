"""Normal noise, and the generators that it is drawn from: held by the caller, named by what they are for."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from retinar.engine.errors import InputError

Source = torch.Generator | Sequence[torch.Generator]
"""One generator, or one for each image: then an image does not depend on those it is drawn with."""


def normal(shape: Sequence[int], source: Source, device: torch.device | str) -> Tensor:
    """fp32 of ``shape`` on ``device``. Drawn where the generators live, so a CPU's give the same for every device.

    Raises InputError unless there is one generator or one for each image.
    """
    if isinstance(source, torch.Generator):
        return torch.randn(tuple(shape), generator=source, device=source.device).to(device)
    if len(source) != shape[0]:
        raise InputError(f"Expected one generator, or {shape[0]} for the images, found {len(source)}: pass as many.")
    return torch.cat([normal((1, *shape[1:]), generator, device) for generator in source])


def seeded(purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator named by a purpose and numbers from 0 to 2^64 - 1, so that there is no state to carry or to lose.

    Two names that differ anywhere give unrelated numbers. The same name gives the same on every machine with the same
    torch and instruction set, and others on a GPU than on a CPU.
    """
    words = [word for number in numbers for word in (number & 0xFFFFFFFF, number >> 32)]
    entropy = np.random.SeedSequence([crc32(purpose.encode()), len(numbers), *words])
    return torch.Generator(device).manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
