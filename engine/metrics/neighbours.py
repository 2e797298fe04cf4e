"""The nearest training image of each image of a set, by Inception features and by LPIPS; training images mirrored too.

Both searches compare every image with every training image in both orientations. Nothing is approximated: LPIPS is a
squared Euclidean distance of long vectors (``LPIPS.vectors``), so that a search is a matrix product, and only the
vectors of one set and of a few training images are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retinar.engine.metrics.copies import mirror
from retinar.engine.metrics.folders import read_image
from retinar.engine.metrics.reconstruction import fit
from retinar.engine.perceptual import LPIPS
from retinar.engine.progress import Progress, silent

LPIPS_SIZE = 64
"""Pixels a side at which LPIPS is taken here (``nearest_lpips`` says why)."""
MEMORY_GB = 2.0
BATCH, BLOCK = 16, 128
"""Images that VGG16 sees at a time, and training images that are compared at a time."""
STRIP = 2**26
"""Numbers of the searching vectors that are widened and multiplied at a time."""


@dataclass
class Nearest:
    """Row i: image i has ``distance`` (fp64 [n]) to training image ``index`` (int64 [n]), ``mirrored`` (bool [n])."""

    distance: np.ndarray
    index: np.ndarray
    mirrored: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> Nearest:
        return Nearest(self.distance[rows], self.index[rows], self.mirrored[rows])

    def split(self, counts: Sequence[int]) -> list[Nearest]:
        """The first ``counts[0]`` rows, the next ``counts[1]``, and so on."""
        return [self[slice(end - count, end)] for end, count in zip(accumulate(counts), counts, strict=True)]


class Search:
    """The nearest of all vectors that are shown to it, block by block, for each of n vectors.

    Distances are squared Euclidean, or with ``correlate`` 1 - the inner product. ``queries_nD`` is kept as it comes
    (fp16 saves memory); products run in ``dtype``. Among equals the first one wins.
    """

    def __init__(self, queries_nD: Tensor, dtype: torch.dtype, *, correlate: bool = False) -> None:
        self.queries_nD, self.dtype, self.correlate = queries_nD, dtype, correlate
        count, dims = queries_nD.shape
        self.rows = [slice(first, first + STRIP // dims + 1) for first in range(0, count, STRIP // dims + 1)]
        self.squares_n = torch.zeros(count, dtype=dtype, device=queries_nD.device)
        for rows in [] if correlate else self.rows:
            self.squares_n[rows] = queries_nD[rows].to(dtype).square().sum(1)
        self.distance_n = self.squares_n.new_full((count,), torch.inf)
        self.index_n = torch.zeros(count, dtype=torch.int64, device=queries_nD.device)
        self.mirrored_n = torch.zeros(count, dtype=torch.bool, device=queries_nD.device)

    def show(self, references_mD: Tensor, start: int, mirrored: bool) -> None:
        """References number ``start`` and following; ``mirrored`` is only noted."""
        references_mD = references_mD.to(self.dtype)
        squares_m = 1.0 if self.correlate else references_mD.square().sum(1)
        factor = 1 if self.correlate else 2
        for rows in self.rows:
            product = self.queries_nD[rows].to(self.dtype) @ references_mD.T
            near, where = (self.squares_n[rows, None] + squares_m - factor * product).min(dim=1)
            better = near < self.distance_n[rows]
            self.distance_n[rows] = torch.where(better, near, self.distance_n[rows])
            self.index_n[rows] = torch.where(better, where + start, self.index_n[rows])
            self.mirrored_n[rows] = (self.mirrored_n[rows] & ~better) | (better & mirrored)

    def result(self) -> Nearest:
        distance = self.distance_n.clamp_min(0).double().cpu().numpy()
        return Nearest(distance, self.index_n.cpu().numpy(), self.mirrored_n.cpu().numpy())


def nearest_features(images: np.ndarray, train: np.ndarray, mirrored: np.ndarray) -> Nearest:
    """Euclidean distance of Inception features: fp32 [n, F] against [m, F] of the training images and their mirrors."""
    search = Search(torch.from_numpy(images).double(), torch.float64)
    for flip, references in ((False, train), (True, mirrored)):
        for start in range(0, len(references), 1024):
            search.show(torch.from_numpy(references[start : start + 1024]), start, flip)
    found = search.result()
    # the product's rounding shows where a distance is nearly nothing: the winner's is taken directly
    winners = np.where(found.mirrored[:, None], mirrored[found.index], train[found.index])
    found.distance = np.linalg.norm(images.astype(np.float64) - winners, axis=1)
    return found


def nearest_lpips(
    sets: Sequence[Iterable[np.ndarray]],
    train: Sequence[Path],
    lpips: LPIPS,
    *,
    size: int = LPIPS_SIZE,
    memory_gb: float = MEMORY_GB,
    progress: Progress = silent,
) -> list[Nearest]:
    """LPIPS distance (VGG16) of the images of each set (uint8 [H, W, 3], read one by one) to the training images.

    Every image is made square and ``size`` pixels wide first, so the figures are not those of LPIPS at full size. The
    cost of VGG16 and of the search goes with the pixels, and 64 suffice: there every one of 48 photographs that was
    compressed (JPEG down to 50), resized, recoloured or made noisy lay below the threshold. Vectors wait in fp16, at
    most ``memory_gb`` of them: 1 MB an image at 64 pixels. Where the sets hold more, the training images go through the
    network once for each such part. Images must be readable.
    """
    device = next(lpips.parameters()).device
    waiting_nD, filled = torch.empty((0, 0)), 0
    found: list[Nearest] = []
    counts: list[int] = []

    def run() -> None:
        search = Search(waiting_nD[:filled], torch.float32)
        with progress("LPIPS to the training images", 2 * len(train)) as bar:
            for flip in (False, True):
                images = (mirror(read_image(path)) if flip else read_image(path) for path in train)
                start = 0
                for vectors_mD in _vectors(images, lpips, size, device, BLOCK):
                    search.show(vectors_mD, start, flip)
                    start += len(vectors_mD)
                    bar.advance(len(vectors_mD))
        found.append(search.result())

    for images in sets:
        counts.append(0)
        for vectors_BD in _vectors(images, lpips, size, device, BATCH):
            if not len(waiting_nD):
                at_once = max(BATCH, int(memory_gb * 1e9 / (2 * vectors_BD.shape[1])))
                waiting_nD = vectors_BD.new_empty((at_once, vectors_BD.shape[1]))
            if filled + len(vectors_BD) > len(waiting_nD):
                run()
                filled = 0
            waiting_nD[filled : filled + len(vectors_BD)] = vectors_BD
            filled += len(vectors_BD)
            counts[-1] += len(vectors_BD)
    if filled:
        run()
    if not found:
        return [Nearest(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool)) for _ in counts]
    whole = Nearest(*(np.concatenate([getattr(part, name) for part in found]) for name in Nearest.__annotations__))
    return whole.split(counts)


def _vectors(
    images: Iterable[np.ndarray], lpips: LPIPS, size: int, device: torch.device, block: int
) -> Iterator[Tensor]:
    """fp16 [at most ``block``, D]; the network sees BATCH images at a time, whatever the block."""
    parts: list[Tensor] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        if batch:
            images_BCHW = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.inference_mode():
                parts.append(lpips.vectors(images_BCHW).half())
            batch.clear()

    for image in images:
        batch.append(fit(image, size))
        if len(batch) == BATCH:
            flush()
            if sum(map(len, parts)) >= block:
                yield torch.cat(parts)
                parts.clear()
    flush()
    if parts:
        yield torch.cat(parts)
