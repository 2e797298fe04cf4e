"""LlamaGen's crops for tokenizer training: a random square of a photograph that was resized at random before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from retinar.train.crops import Crops, to_tensor
from retinar.train.data.images import ImageSet
from retinar.train.views import Pixels, resize_shorter

LEAST_SHARE = 0.8
"""Of the resized photograph's shorter side, that a crop's side has: from this to all of it."""
_STREAM = 3

Indices = NDArray[np.int64]


class RandomCrops(Crops):
    """Crops of ``size`` pixels from photographs of any size; smaller ones are enlarged. Pure functions of (seed, step).

    ``order(step)`` gives the images of a step and whether they are mirrored: ``workers`` threads make the next step's
    crops while this one's are trained on.
    """

    def __init__(
        self, images: ImageSet, *, size: int, seed: int, workers: int, order: Callable[[int], tuple[Indices, Indices]]
    ) -> None:
        super().__init__(images, size=size, crop_size=None, seed=seed)
        self.order = order
        self._pool = ThreadPoolExecutor(workers, "retinar-crops")
        self._ahead: tuple[int, list[Future[Pixels]]] | None = None

    def batch(
        self,
        step: int,
        indices: Sequence[int] | Indices,
        mirrored: Indices,
        *,
        whole: bool,
        share: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """fp32 [B, 3, S, S] in [-1, 1], as :meth:`Crops.batch`; ``whole`` means nothing here."""
        begun = self._ahead if self._ahead and self._ahead[0] == step else (step, self._begin(step, share))
        pixels = [future.result() for future in begun[1]]
        self._ahead = (step + 1, self._begin(step + 1, share))
        return to_tensor(np.stack(pixels))

    def _begin(self, step: int, share: tuple[int, int]) -> list[Future[Pixels]]:
        indices, mirrored = self.order(step)
        own = range(len(indices) * share[0] // share[1], len(indices) * (share[0] + 1) // share[1])
        return [self._pool.submit(self._crop, step, row, int(indices[row]), bool(mirrored[row])) for row in own]

    def _crop(self, step: int, row: int, index: int, mirror: bool) -> Pixels:
        random = np.random.default_rng([self.seed, step, row, _STREAM])
        side = int(random.integers(self.size, math.ceil(self.size / LEAST_SHARE) + 1))
        pixels = resize_shorter(self.images.load(index), side)
        top, left = (int(random.integers(length - self.size + 1)) for length in pixels.shape[:2])
        crop = pixels[top : top + self.size, left : left + self.size]
        return crop[:, ::-1] if mirror else crop
