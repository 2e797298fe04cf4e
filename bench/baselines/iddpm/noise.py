"""Normal noise from generators that the caller holds."""

from __future__ import annotations

from collections.abc import Sequence

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
