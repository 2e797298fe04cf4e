"""PSNR and SSIM of a reconstruction, as scikit-image computes them for LlamaGen's ``reconstruction_vq_ddp.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 7
RANGE = 2.0
"""SSIM's range of values as upstream sets it, though its images lie in [0, 1]: it makes the figure larger."""


def psnr(made_HWC: Tensor, wanted_HWC: Tensor) -> float:
    """Decibels over a peak of 1; infinite for equal images."""
    error = float((made_HWC.double() - wanted_HWC.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(1 / error)


def ssim(made_HWC: Tensor, wanted_HWC: Tensor) -> float:
    """Mean structural similarity over windows of 7x7 pixels and the channels; images of at least 7 pixels."""
    x, y = (image.double().movedim(-1, 0)[:, None] for image in (made_HWC, wanted_HWC))
    count = WINDOW * WINDOW
    mean_x, mean_y = _mean(x), _mean(y)
    sample = count / (count - 1)
    var_x, var_y = (sample * (_mean(z * z) - mean * mean) for z, mean in ((x, mean_x), (y, mean_y)))
    covariance = sample * (_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return float((above / below).mean())


def _mean(images_C1HW: Tensor) -> Tensor:
    """Of each window that lies within the image."""
    return F.avg_pool2d(images_C1HW, WINDOW, stride=1)


def as_unit(images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] as [B, H, W, C] in [0, 1]."""
    return ((images_BCHW + 1.0) / 2.0).movedim(-3, -1).to(torch.float32)
