"""Photographs in class folders of any depth, in the order and with the labels of torchvision's ``ImageFolder``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from retinar.engine.errors import InputError
from retinar.train.data.images import ImageSet
from retinar.train.data.manifest import MANIFEST

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision takes for images, in either case."""


class ImageFolder(ImageSet):
    """``root/{class}/**/*``: classes are numbered in the order of their sorted names, images are of any size.

    InputError without classes, for a class without images, and for the root of a prepared folder, whose folders are
    splits.
    """

    def __init__(self, root: Path | str) -> None:
        self.root, self.split, self.size = Path(root), None, None
        if not self.root.is_dir():
            raise InputError(f"Expected a folder of class folders at --data-path {root}, found none: check the path.")
        if (self.root / MANIFEST).is_file():
            raise InputError(
                f"Expected class folders in --data-path {root}, found the splits of a prepared folder: give "
                f"{self.root / 'train'}."
            )
        with os.scandir(self.root) as entries:
            self.classes = tuple(sorted(entry.name for entry in entries if entry.is_dir()))
        found = [_images(self.root / name) for name in self.classes]
        for name, paths in zip(self.classes, found, strict=True):
            if not paths:
                raise InputError(f"Expected images in every class folder, found none in {self.root / name}: remove it.")
        if not found:
            raise InputError(f"Expected a folder for each class in {root}, found none: sort the photographs by class.")
        self.paths = [path for paths in found for path in paths]
        self.labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(paths) for paths in found])

    def listing(self) -> str:
        """SHA-256 over names and lengths of the files in their order: cheap where the contents are terabytes."""
        found = hashlib.sha256()
        for path in self.paths:
            found.update(f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n".encode())
        return found.hexdigest()


def _images(folder: Path) -> list[Path]:
    return [
        Path(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
    ]
