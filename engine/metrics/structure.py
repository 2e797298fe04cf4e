"""How much alike two photographs are in their vessels, wherever these lie: correlation after alignment.

Photographs of one camera share their frame, colour and shading, which is most of what Inception and VGG16 see; what
they do not share are vessels and lesions. So the green channel (where vessels are darkest) is freed of shading and
contrast, and two such patterns are compared at every small shift, rotation and scale. Copies stay recognisable when
they are compressed, recoloured, cropped or turned a little; no network is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from retinar.engine.errors import InputError
from retinar.engine.metrics.folders import read_image
from retinar.engine.metrics.inception import INSTALL
from retinar.engine.metrics.neighbours import Nearest, Search
from retinar.engine.metrics.reconstruction import fit
from retinar.engine.progress import Progress, silent

SIZE = 64
"""Pixels a side of a pattern."""
SCALE = SIZE / 20
"""Standard deviation, in pixels, of the Gaussian below which structure counts."""
DARK = 20
"""8-bit level that a pixel of the fundus exceeds in some channel."""
TURNS = ((0.0, 1.0, 2), (2.0, 1.0, 1), (-2.0, 1.0, 1), (4.0, 1.0, 1), (-4.0, 1.0, 1), (0.0, 1.05, 1), (0.0, 0.95, 1))
"""Alignments: degrees, scale, and the largest shift in pixels, both ways and both directions."""
BLOCK = 512


def pattern(pixels: np.ndarray) -> np.ndarray:
    """fp32 [64, 64] of length 1 from uint8 [H, W, 3]: green, less its surroundings, over their contrast.

    Zero outside the fundus and near its rim, and all zero where there is no structure at all.
    """
    try:
        from scipy.ndimage import gaussian_filter
    except ImportError as error:
        raise InputError(f"Expected the package scipy, found none ({error}): {INSTALL}.") from error
    small = fit(pixels, SIZE)
    green = small[..., 1].astype(np.float32)
    inside = gaussian_filter((small.max(2) > DARK).astype(np.float32), SCALE, truncate=3) > 0.98
    detail = np.where(inside, green - gaussian_filter(green, SCALE, truncate=3), 0)
    weight = np.maximum(gaussian_filter(inside.astype(np.float32), SCALE, truncate=3), 1e-3)
    contrast = np.sqrt(gaussian_filter(detail**2, SCALE, truncate=3) / weight)
    # 2 levels of 255: below that it is the noise of 8 bits that would be magnified
    flat = np.clip(detail / (contrast + 2), -4, 4)
    if inside.any():
        flat = np.where(inside, flat - flat[inside].mean(), 0)
    length = float(np.linalg.norm(flat))
    return (flat / length if length > 1e-3 else np.zeros_like(flat)).astype(np.float32)


def nearest_structure(
    sets: Sequence[Iterable[np.ndarray]],
    train: Sequence[Path],
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> list[Nearest]:
    """1 - the largest correlation of each image's pattern (uint8 [H, W, 3], read one by one) with a training image's.

    0 for copies, about 1 for images that have nothing in common. Training patterns, also mirrored, are moved as TURNS
    says. Images must be readable.
    """
    patterns = [[pattern(image) for image in images] for images in sets]
    counts = [len(each) for each in patterns]
    rows = [row.ravel() for each in patterns for row in each]
    queries = torch.from_numpy(np.stack(rows) if rows else np.zeros((0, SIZE * SIZE), np.float32)).to(device)
    search = Search(queries, torch.float32, correlate=True)
    with progress("structure of the training images", len(train)) as bar:
        for start in range(0, len(train), BLOCK):
            files = train[start : start + BLOCK]
            block_mHW = torch.from_numpy(np.stack([pattern(read_image(path)) for path in files])).to(device)
            for degrees, scale, reach in TURNS:
                turned_mHW = turn(block_mHW, degrees, scale)
                for flip in (False, True):
                    for move_y in range(-reach, reach + 1):
                        for move_x in range(-reach, reach + 1):
                            moved = torch.roll(turned_mHW.flip(2) if flip else turned_mHW, (move_y, move_x), (1, 2))
                            search.show(moved.flatten(1), start, flip)
            bar.advance(len(files))
    return search.result().split(counts)


def turn(patterns_mHW: Tensor, degrees: float, scale: float) -> Tensor:
    """Patterns rotated about the centre and magnified, at length 1 again."""
    if degrees == 0 and scale == 1:
        return patterns_mHW
    cosine, sine = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    matrix = patterns_mHW.new_tensor([[cosine, -sine, 0], [sine, cosine, 0]]).expand(len(patterns_mHW), 2, 3)
    grid = nn.functional.affine_grid(matrix, [len(patterns_mHW), 1, SIZE, SIZE], align_corners=False)
    turned = nn.functional.grid_sample(patterns_mHW[:, None], grid, "bicubic", align_corners=False)[:, 0]
    return turned / turned.flatten(1).norm(dim=1).clamp_min(1e-3)[:, None, None]
