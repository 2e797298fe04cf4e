"""Structural similarity of an image and its copy (Wang, Bovik, Sheikh and Simoncelli 2004)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.metrics.inception import INSTALL
from retinar.engine.torchvision_shim import import_torchvision

WINDOW = 11
"""Pixels of the Gaussian window's side (sigma 1.5)."""


def ssim(original: np.ndarray, copy: np.ndarray) -> float | None:
    """The index of two uint8 images [H, W, 3] by torchmetrics in fp32 (to 5e-5), the mean over channels; 1 if equal.

    Windows lie inside the image, as in the paper (torchmetrics' own mean also counts those over its mirrored border).
    None for images smaller than one window. InputError where the package is missing.
    """
    if min(original.shape[:2]) < WINDOW:
        return None
    border = WINDOW // 2
    sides = (torch.tensor(each).permute(2, 0, 1)[None].float() for each in (copy, original))
    similarity_1CHW: Tensor = _torchmetrics()(*sides, data_range=255.0, return_full_image=True)[1]
    return float(similarity_1CHW[..., border:-border, border:-border].mean(dtype=torch.float64))


def _torchmetrics() -> Callable[..., Any]:
    with contextlib.suppress(ImportError):
        import_torchvision()  # torchmetrics imports it where it is installed
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise InputError(f"Expected the package torchmetrics for SSIM, found none ({error}): {INSTALL}.") from error
    return structural_similarity_index_measure
