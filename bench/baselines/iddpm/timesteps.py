"""Which diffusion steps a training step takes: evenly drawn, or more often where the bound's terms are large.

A pure function of (seed, training step) and, for the second, of the terms seen so far. Source: Nichol & Dhariwal 2021,
section 3.3 (importance sampling: probability as the root of a term's mean square over its last ten values).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retinar.bench.baselines.iddpm.noise import seeded

Drawing = Literal["uniform", "loss-second-moment"]
SEEN = 10
"""Values of each step's loss that are kept; before all steps have so many, steps are drawn evenly."""
EVEN = 0.001
"""Share of the draws that stays even, so that no step is forgotten."""


class Timesteps:
    """Draws ``count`` of ``steps`` diffusion steps for each training step. Its state lies on the host."""

    def __init__(self, drawing: Drawing, steps: int, count: int, *, seed: int) -> None:
        self.drawing, self.steps, self.count, self.seed = drawing, steps, count, seed
        kept = SEEN if drawing != "uniform" else 0
        self.losses_TS = torch.zeros(steps, kept, dtype=torch.float64)
        """The last losses of each diffusion step, newest last."""
        self.seen_T = torch.zeros(steps, dtype=torch.int64)

    @property
    def learns(self) -> bool:
        """Whether :meth:`update` is to be told the losses."""
        return self.drawing != "uniform"

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """(diffusion steps int64 [count], what to weigh their losses by fp32 [count]) of training step ``step``."""
        source = seeded("timesteps", self.seed, step)
        if not self.learns or int(self.seen_T.min()) < SEEN:
            return torch.randint(self.steps, (self.count,), generator=source), torch.ones(self.count)
        root_T = self.losses_TS.square().mean(1).sqrt()
        share_T = (1 - EVEN) * root_T / root_T.sum() + EVEN / self.steps
        t_B = torch.multinomial(share_T, self.count, replacement=True, generator=source)
        return t_B, (1 / (self.steps * share_T[t_B])).float()

    def update(self, t_B: Tensor, losses_B: Tensor) -> None:
        """Take in the unweighted losses at these diffusion steps: the whole batch's, in the same order everywhere."""
        for t, loss in zip(t_B.tolist(), losses_B.double().tolist(), strict=True):
            self.losses_TS[t] = torch.cat([self.losses_TS[t, 1:], torch.tensor([loss], dtype=torch.float64)])
            self.seen_T[t] += 1
