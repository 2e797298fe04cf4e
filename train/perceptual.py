"""LPIPS as a training loss."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from retinar.engine.perceptual import LPIPS

WAYS_OUT = "give them with --set perceptual_weights=PATH, or train without with --set perceptual=none"


class PerceptualLoss(LPIPS):
    """Mean LPIPS distance of reconstructions to photographs, differentiable in the reconstructions alone."""

    def __init__(self, weights: Path | str | None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weights, dtype=dtype, advice=WAYS_OUT)

    def forward(self, reconstruction_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """fp32 [B, 3, H, W] in [-1, 1], H and W at least 16 -> fp32 scalar."""
        with torch.no_grad():
            wanted = self.features(images_BCHW)
        return self.between(self.features(reconstruction_BCHW), wanted).mean()
