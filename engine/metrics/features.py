"""Inception features of files and arrays, computed once a process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from retinar.engine.errors import InputError
from retinar.engine.metrics.folders import read_image
from retinar.engine.metrics.inception import FEATURES, INSTALL, SIZE, Inception, check_mode
from retinar.engine.metrics.screening import Look
from retinar.engine.progress import Progress, silent

T = TypeVar("T")
R = TypeVar("R")
Resizer = Callable[[np.ndarray], np.ndarray]
BATCH = {"cpu": 8, "cuda": 64}
"""Images at a time: on a CPU more only fall out of its cache."""
# clean-fid's names of the two preparations; its third, legacy_tensorflow, resizes inside a network we do not have.
CLEANFID_MODES = {"clean": "clean", "legacy": "legacy_pytorch"}


def resizer(mode: str) -> Resizer:
    """clean-fid's own function from an image [H, W, 3] (uint8) to fp32 [299, 299, 3], values 0 to 255, not rounded.

    ``clean`` is Pillow's antialiased bicubic, ``legacy`` PyTorch's bilinear without antialiasing.
    """
    name = CLEANFID_MODES[check_mode(mode)]
    try:
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise InputError(f"Expected the package clean-fid for FID, found none ({error}): {INSTALL}.") from error
    with warnings.catch_warnings():  # its legacy branch silences every warning of the process
        return build_resizer(name)


@dataclass
class Features:
    """fp32 [n, 2048], row i of ``files[i]``, which looked like ``looks[i]``; ``skipped`` holds (file, reason) of what
    could not be read.
    """

    array: np.ndarray
    files: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...] = ()
    looks: tuple[Look, ...] = ()


@dataclass
class FeatureStore:
    """Features by network, remembered per (mode, file), mirrored or not, for as long as the store lives."""

    inception: Inception
    batch_size: int = 0
    """Images at a time; 0 is the device's own."""
    progress: Progress = silent
    _rows: dict[tuple[str, bool, Path], np.ndarray] = field(default_factory=dict, repr=False)
    _skipped: dict[Path, str] = field(default_factory=dict, repr=False)
    _looks: dict[Path, Look] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.batch_size = self.batch_size or BATCH.get(self.inception.device.type, 8)

    def of_files(
        self, files: Sequence[Path], mode: str = "clean", label: str = "Inception features", *, mirrored: bool = False
    ) -> Features:
        """Features in the order of ``files``, without those that cannot be read; ``mirrored``: left and right swap."""
        fresh = [path for path in files if (mode, mirrored, path) not in self._rows and path not in self._skipped]
        if fresh:
            resize, workers = resizer(mode), min(8, os.cpu_count() or 1)
            with self.progress(label, len(fresh)) as bar, ThreadPoolExecutor(workers) as pool:
                load = _Loader(resize, mirrored)
                for batch in _batches(_ahead(pool, load, fresh, 2 * self.batch_size), self.batch_size):
                    self._skipped.update({path: read for path, read in batch if isinstance(read, str)})
                    good = [(path, read) for path, read in batch if not isinstance(read, str)]
                    rows = self._run([read.pixels for _, read in good], mode)
                    for (path, read), row in zip(good, rows, strict=True):
                        self._rows[mode, mirrored, path], self._looks[path] = row, read.look
                    bar.advance(len(batch))
        known = tuple(path for path in files if path not in self._skipped)
        array = [self._rows[mode, mirrored, path] for path in known]
        skipped = tuple((path, self._skipped[path]) for path in files if path in self._skipped)
        looks = tuple(self._looks[path] for path in known)
        return Features(np.stack(array) if array else np.zeros((0, FEATURES), np.float32), known, skipped, looks)

    def of_arrays(self, images: Iterable[np.ndarray], mode: str = "clean") -> np.ndarray:
        """fp32 [n, 2048] of images [H, W, 3] in uint8, of any size; read one batch at a time, not remembered."""
        resize = resizer(mode)
        rows = [self._run([resize(image) for image in batch], mode) for batch in _batches(images, self.batch_size)]
        return np.concatenate(rows) if rows else np.zeros((0, FEATURES), np.float32)

    def _run(self, resized: list[np.ndarray], mode: str) -> np.ndarray:
        if not resized:
            return np.zeros((0, FEATURES), np.float32)
        images_BHWC = torch.from_numpy(np.stack(resized))
        return self.inception.features(images_BHWC.permute(0, 3, 1, 2).contiguous(), mode).numpy()


@dataclass(frozen=True)
class _Read:
    """fp32 [299, 299, 3] pixels, and what the image was before."""

    pixels: np.ndarray
    look: Look


@dataclass(frozen=True)
class _Loader:
    """Reads and resizes one file; a failure is a value (its reason), so that one bad file costs one file."""

    resize: Resizer
    mirrored: bool = False

    def __call__(self, path: Path) -> tuple[Path, _Read | str]:
        try:
            pixels = read_image(path)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            return path, str(error) or type(error).__name__
        resized = self.resize(np.ascontiguousarray(pixels[:, ::-1]) if self.mirrored else pixels)
        assert resized.shape == (SIZE, SIZE, 3)
        return path, _Read(resized, Look.of(pixels))


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Results in order, with at most ``depth`` items in work: a large folder is never in memory as a whole."""
    waiting: list[Future[R]] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= depth:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
