"""Reading prepared photographs: by the manifest where there is one, else as plain class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retinar.engine.errors import InputError
from retinar.train.data.layouts import SUFFIXES
from retinar.train.data.manifest import JOURNAL, MANIFEST, read_manifest
from retinar.train.data.photographs import UnreadableError, decode, to_rgb

Pixels = npt.NDArray[np.uint8]


class ImageSet:
    """The photographs of one split in a fixed order: by class, then by file.

    ``root`` is a folder from ``retinar prepare``, or any ``root/{split}/{class}/*``; with ``split=None`` a prepared
    folder gives all its splits, and a plain one is read as ``root/{class}/*``. ``classes`` fixes the classes and their
    numbers (a class that it leaves out is not read); by default they are the names found, sorted. ``size`` demands
    size x size pixels. Raises InputError for a missing split, an empty class, or another size.
    """

    def __init__(
        self,
        root: Path | str,
        split: str | None = "train",
        classes: Sequence[str] | None = None,
        size: int | None = None,
    ) -> None:
        self.root, self.split, self.size = Path(root), split, size
        if not self.root.is_dir():
            raise InputError(f"expected a folder of prepared photographs, but {self.root} is not one: check the path")
        prepared = (self.root / MANIFEST).is_file() or (self.root / JOURNAL).is_file()
        found = self._from_manifest() if prepared else self._from_folders()
        self.classes: tuple[str, ...] = tuple(classes) if classes is not None else tuple(sorted(found))
        where = self.root if split is None else self.root / split
        for name in self.classes:
            if not found.get(name):
                raise InputError(
                    f"expected photographs of class {name} in {where}, found "
                    f"{', '.join(f'{len(paths)} {other}' for other, paths in sorted(found.items())) or 'none'}"
                )
        self.paths: list[Path] = [path for name in self.classes for path in sorted(found[name])]
        self.labels: npt.NDArray[np.int64] = np.repeat(
            np.arange(len(self.classes), dtype=np.int64), [len(found[name]) for name in self.classes]
        )
        if size is not None:
            self.load(0)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Pixels:
        """uint8 [H, W, 3]."""
        path = self.paths[index]
        try:
            pixels = np.array(to_rgb(decode(path.read_bytes())))
        except FileNotFoundError:
            raise InputError(f"{path} has vanished since it was listed: run retinar prepare again") from None
        except UnreadableError as error:
            raise InputError(f"expected a readable photograph in {path}, found: {error}") from error
        if self.size is not None and pixels.shape[:2] != (self.size, self.size):
            height, width = pixels.shape[:2]
            raise InputError(
                f"expected {self.size}x{self.size} pixels in {path}, got {width}x{height}: "
                f"run retinar prepare with --size {self.size}"
            )
        return pixels

    def load_batch(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> Pixels:
        """uint8 [B, H, W, 3]; the photographs must be equally large."""
        images = [self.load(int(index)) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise InputError(
                    f"expected photographs of one size, got {images[0].shape[1::-1]} and {image.shape[1::-1]} "
                    f"({self.paths[int(index)]}): run retinar prepare first"
                )
        return np.stack(images)

    def _from_manifest(self) -> dict[str, list[Path]]:
        records = read_manifest(self.root)
        chosen = [record for record in records if self.split in (None, record.split)]
        if not chosen:
            splits = ", ".join(sorted({record.split for record in records})) or "none"
            raise InputError(f"expected a split {self.split} in {self.root}, found {splits}: choose one of them")
        found: dict[str, list[Path]] = {}
        for record in chosen:
            found.setdefault(record.label, []).append(self.root / record.file)
        absent = [path for path in (p for paths in found.values() for p in paths) if not path.is_file()]
        if absent:
            raise InputError(
                f"{len(absent)} photographs of the manifest in {self.root} are missing ({absent[0].name}): "
                "run the same retinar prepare again"
            )
        return found

    def _from_folders(self) -> dict[str, list[Path]]:
        folder = self.root if self.split is None else self.root / self.split
        if not folder.is_dir():
            names = ", ".join(sorted(p.name for p in self.root.iterdir() if p.is_dir())) or "no folders"
            raise InputError(f"expected a split {self.split} in {self.root}, found {names}: choose one of them")
        found = {
            entry.name: [p for p in entry.iterdir() if _is_photograph(p)]
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        }
        if not found:
            raise InputError(f"expected one folder per class in {folder}, found none: sort the photographs by class")
        return found


def _is_photograph(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()
