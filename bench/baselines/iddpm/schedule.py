"""Noise schedules, and which of their steps a sampler takes. All in float64 on the host.

Steps count from 0: after step t an image has kept ``sqrt(alpha_bar[t])`` of itself. Sources: Ho et al. 2020 (linear),
Nichol & Dhariwal 2021 (cosine, equation 17; respacing, section 4), Song et al. 2021 (the "ddim" stride).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from retinar.engine.errors import InputError

SCHEDULES = ("linear", "cosine")
MAX_BETA = 0.999
"""The cosine schedule's last beta would be 1, which leaves nothing of the image to predict."""

Table = NDArray[np.float64]
Respacing = str | int | Sequence[int] | None
"""Which steps to take: None: all; a number: so many, evenly spread; several numbers, or "10,15,20": so many of each of
as many equal sections; "ddim25": 25 with one whole stride from step 0."""


@dataclass(frozen=True)
class Schedule:
    """The betas of a process, and the steps of the trained process that they are."""

    betas_T: Table
    timesteps_T: NDArray[np.int64]
    """Of each step, its number in the trained process: what the network is told."""
    trained_steps: int

    def __len__(self) -> int:
        return len(self.betas_T)


def schedule(name: str, steps: int, respacing: Respacing = None) -> Schedule:
    """The schedule ``name`` over ``steps`` steps, or some of them (see ``Respacing``).

    Raises InputError for an unknown name, a number of steps that the schedule does not allow, or an impossible spacing.
    """
    betas_T = named_betas(name, steps)
    if respacing is None or respacing == "":
        return Schedule(betas_T, np.arange(steps), steps)
    timesteps = spaced(steps, respacing)
    return Schedule(respaced_betas(betas_T, timesteps), np.array(timesteps, dtype=np.int64), steps)


def named_betas(name: str, steps: int) -> Table:
    """The share of its variance that each step replaces by noise: float64 [steps], in (0, 1)."""
    if steps < 1:
        raise InputError(f"Expected diffusion steps above 0, found {steps}: give 1000 or 4000.")
    if name == "linear":
        betas_T = np.linspace(0.1 / steps, 20.0 / steps, steps)
        if betas_T[-1] >= 1:
            raise InputError(f"Expected more than 20 linear steps, found {steps}: take more, or the cosine schedule.")
        return betas_T
    if name == "cosine":
        alpha_bar = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
        return np.array([min(1 - alpha_bar[t + 1] / alpha_bar[t], MAX_BETA) for t in range(steps)])
    raise InputError(f"Expected the noise schedule {' or '.join(SCHEDULES)}, found {name!r}: choose one of them.")


def spaced(steps: int, respacing: str | int | Sequence[int]) -> list[int]:
    """The steps to take of ``steps``, ascending. InputError where there are not as many, or the words are unknown."""
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        return _strided(steps, respacing)
    counts = _counts(respacing)
    each, longer = divmod(steps, len(counts))
    chosen: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = each + (section < longer)
        if not 0 <= count <= size:
            raise InputError(f"Expected 0 to {size} steps of a section of {size}, found {count}: take fewer steps.")
        # Summed up step by step, as the public code does: a product would round another way at some halves.
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        places = accumulate([stride] * (count - 1), initial=0.0) if count else ()
        chosen += [start + round(place) for place in places]
        start += size
    if not chosen:
        raise InputError(f"Expected at least one step to take, found {respacing!r}: take more.")
    return chosen


def _strided(steps: int, respacing: str) -> list[int]:
    digits = respacing.removeprefix("ddim")
    wanted = int(digits) if digits.isascii() and digits.isdigit() else 0
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == wanted:
            return list(range(0, steps, stride))
    raise InputError(
        f"Expected ddimN with N steps that a whole stride over {steps} makes, found {respacing!r}: "
        "give another N, or N alone."
    )


def _counts(respacing: str | int | Sequence[int]) -> list[int]:
    try:
        parts = respacing.split(",") if isinstance(respacing, str) else respacing
        counts = [int(part) for part in ([parts] if isinstance(parts, int) else parts)]
    except (TypeError, ValueError):
        counts = []
    if not counts:
        raise InputError(f"Expected a respacing as 250, 10,15,20 or ddim25, found {respacing!r}: write one of these.")
    return counts


def respaced_betas(betas_T: Table, timesteps: Sequence[int]) -> Table:
    """The betas of the process that visits ``timesteps`` (ascending) alone, with the same ``alpha_bar`` there."""
    alpha_bar_S = np.cumprod(1 - betas_T)[list(timesteps)]
    return 1 - alpha_bar_S / np.append(1.0, alpha_bar_S[:-1])
