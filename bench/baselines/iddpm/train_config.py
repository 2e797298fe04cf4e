"""What a training run of an iDDPM is, beside what it has in common with the other trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retinar.bench.baselines.iddpm.config import IDDPMConfig
from retinar.bench.baselines.iddpm.timesteps import Drawing
from retinar.engine.errors import InputError
from retinar.train.config import OptimConfig, TrainConfig

PUBLIC = OptimConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=None)
"""improved-diffusion's AdamW."""


@dataclass(frozen=True, kw_only=True)
class IDDPMTrainConfig(TrainConfig):
    """Training of the diffusion model on photographs.

    mirror: each pass shows a photograph or its mirror image. timesteps: how a step's diffusion steps are drawn;
    "loss-second-moment" is the paper's for objective "vlb" alone. activation_checkpointing "full" keeps each stage's
    input alone for the backward pass and computes the rest again. Validation and export use the averaged weights where
    ``ema_decay`` is set.
    """

    model: IDDPMConfig
    optim: OptimConfig = PUBLIC
    mirror: bool = True
    timesteps: Drawing = "uniform"
    activation_checkpointing: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps != "uniform" and self.model.objective != "vlb":
            raise InputError(
                f"Expected timesteps=uniform with model.objective {self.model.objective}, found {self.timesteps}: "
                "it is for model.objective=vlb."
            )
