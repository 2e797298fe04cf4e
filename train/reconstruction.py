"""How well a tokenizer gives validation photographs back: figures, and a sheet to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinar.engine.files import atomic_write
from retinar.engine.images import to_bytes
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.config import Precision
from retinar.train.crops import to_tensor
from retinar.train.data.images import ImageSet
from retinar.train.device import autocast

SHEET_IMAGES = 8


@torch.no_grad()
def reconstruction_figures(
    model: VQTokenizer, images: ImageSet, *, count: int, precision: Precision, sheet: Path | None = None
) -> dict[str, float]:
    """Over at most ``count`` whole photographs, evenly spaced: ``l2`` (mean squared error of images in [-1, 1]),
    ``psnr`` (mean, dB), ``usage`` (share of the codebook in use) and ``perplexity`` of the codes.

    ``model``: in evaluation mode. ``sheet``: where to draw some of them over their reconstructions.
    """
    device = next(model.parameters()).device
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), count)).astype(np.int64))
    used_K = torch.zeros(model.config.codebook_size, dtype=torch.float64)
    errors: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for index in chosen:  # one by one: whole images are large
        images_BCHW = to_tensor(images.load_batch([index])).to(device)
        with autocast(device, precision):
            codes_Bhw = model.encode(images_BCHW)
            made_BCHW = model.decode(codes_Bhw).clamp(-1.0, 1.0)
        errors.append((made_BCHW - images_BCHW).square().mean().double().cpu())
        used_K += torch.bincount(codes_Bhw.flatten().cpu(), minlength=len(used_K))
        pairs.append((images_BCHW[0].cpu(), made_BCHW[0].cpu()))
    if sheet is not None:
        save_sheet(pairs[:: max(1, len(pairs) // SHEET_IMAGES)][:SHEET_IMAGES], sheet)
    error = torch.stack(errors)
    return {
        "l2": error.mean().item(),
        "psnr": (10.0 * torch.log10(4.0 / error.clamp_min(1e-12))).mean().item(),
        "usage": (used_K > 0).double().mean().item(),
        "perplexity": torch.special.entr(used_K / used_K.sum()).sum().exp().item(),
    }


def save_sheet(pairs: list[tuple[Tensor, Tensor]], path: Path) -> None:
    """Photographs [3, H, W] in the upper row, their reconstructions below, as one PNG."""
    rows = [np.concatenate([to_bytes(image) for image in row], axis=1) for row in zip(*pairs, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")
