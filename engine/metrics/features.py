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
    """fp32 [n, 2048], row i of ``files[i]``; ``skipped`` holds (file, reason) of what could not be read."""

    array: np.ndarray
    files: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...] = ()


@dataclass
class FeatureStore:
    """Features by network, remembered per (mode, file) for as long as the store lives."""

    inception: Inception
    batch_size: int = 0
    """Images at a time; 0 is the device's own."""
    progress: Progress = silent
    _rows: dict[tuple[str, Path], np.ndarray] = field(default_factory=dict, repr=False)
    _skipped: dict[Path, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.batch_size = self.batch_size or BATCH.get(self.inception.device.type, 8)

    def of_files(self, files: Sequence[Path], mode: str = "clean", label: str = "Inception features") -> Features:
        """Features in the order of ``files``, without those that cannot be read."""
        fresh = [path for path in files if (mode, path) not in self._rows and path not in self._skipped]
        if fresh:
            resize, workers = resizer(mode), min(8, os.cpu_count() or 1)
            with self.progress(label, len(fresh)) as bar, ThreadPoolExecutor(workers) as pool:
                load = _Loader(resize)
                for batch in _batches(_ahead(pool, load, fresh, 2 * self.batch_size), self.batch_size):
                    good = [(path, pixels) for path, pixels, _ in batch if pixels is not None]
                    self._skipped.update({path: reason for path, pixels, reason in batch if pixels is None})
                    for (path, _), row in zip(good, self._run([pixels for _, pixels in good], mode), strict=True):
                        self._rows[mode, path] = row
                    bar.advance(len(batch))
        read = tuple(path for path in files if path not in self._skipped)
        rows = [self._rows[mode, path] for path in read]
        skipped = tuple((path, self._skipped[path]) for path in files if path in self._skipped)
        return Features(np.stack(rows) if rows else np.zeros((0, FEATURES), np.float32), read, skipped)

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
class _Loader:
    """Reads and resizes one file; a failure is a value, so that one bad file costs one file."""

    resize: Resizer

    def __call__(self, path: Path) -> tuple[Path, np.ndarray | None, str]:
        try:
            pixels = read_image(path)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            return path, None, str(error) or type(error).__name__
        resized = self.resize(pixels)
        assert resized.shape == (SIZE, SIZE, 3)
        return path, resized, ""


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
