"""Photographs as training batches: cached pixels, random square crops, mirrors. A pure function of (seed, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file
from retinar.train.data.images import ImageSet

CACHE_BYTES = 4 << 30
"""Decoded photographs kept in memory (256 px: 21,800 of them); those beyond are decoded each time."""
_CROPS, _SQUARES = 1, 2  # streams of random numbers beside each other: (seed, step, stream)


class Crops:
    """Batches of ``images``, which must be squares of one size."""

    def __init__(self, images: ImageSet, *, size: int, crop_size: int | None, seed: int) -> None:
        if crop_size is not None and crop_size > size:
            raise InputError(
                f"Expected crop_size of at most {size} (the photographs), found {crop_size}: "
                f"set crop_size={size} or none."
            )
        self.images, self.size, self.crop_size, self.seed = images, size, crop_size or size, seed
        self._cache: list[NDArray[np.uint8] | None] = [None] * len(images)
        self._room = CACHE_BYTES

    def whole_images(self, batch_size: int) -> int:
        """How many whole images have the pixels of a batch of crops (at least one)."""
        return max(1, batch_size * self.crop_size**2 // self.size**2)

    def batch(
        self,
        step: int,
        indices: Sequence[int] | NDArray[np.int64],
        mirrored: NDArray[np.int64],
        *,
        whole: bool,
        share: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """fp32 [B, 3, S, S] in [-1, 1]: one crop of each of the images, S = crop_size.

        ``whole``: the first images as they are, S = size, as many as have the pixels of all the crops (at least one).
        ``share`` (i, n): the i-th of n even runs of them alone, with the crops that it has in the whole batch.
        """
        side = self.size if whole else self.crop_size
        if whole:
            indices = indices[: self.whole_images(len(indices))]
        corners = np.random.default_rng([self.seed, step, _CROPS]).integers(
            self.size - side + 1, size=(len(indices), 2)
        )
        own = slice(len(indices) * share[0] // share[1], len(indices) * (share[0] + 1) // share[1])
        indices, mirrored, corners = indices[own], mirrored[own], corners[own]
        pixels = np.empty((len(indices), side, side, 3), np.uint8)
        for row, (index, mirror, (top, left)) in enumerate(zip(indices, mirrored, corners, strict=True)):
            crop = self._pixels(int(index))[top : top + side, left : left + side]
            pixels[row] = crop[:, ::-1] if mirror else crop
        return to_tensor(pixels)

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        cached = self._cache[index]
        if cached is not None:
            return cached
        pixels = self.images.load(index)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._cache[index] = pixels
        return pixels


def fingerprint(images: ImageSet) -> str:
    """SHA-256 over the photographs' contents in their order."""
    return hashlib.sha256("".join(sha256_file(path) for path in images.paths).encode()).hexdigest()


def to_tensor(pixels_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1] (upstream's ToTensor and Normalize)."""
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def random_square(size: int, share: float, *, seed: int, step: int) -> tuple[slice, slice]:
    """Rows and columns of a random square with ``share`` of the side ``size`` (at least 16 pixels or all there are)."""
    side = min(size, max(16, round(size * share)))
    top, left = np.random.default_rng([seed, step, _SQUARES]).integers(size - side + 1, size=2).tolist()
    return slice(top, top + side), slice(left, left + side)
