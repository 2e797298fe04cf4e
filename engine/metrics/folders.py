"""Image folders as they come: flat, with class subfolders, or the output of ``retinar generate``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from retinar.engine.errors import InputError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
SPLITS = frozenset({"train", "valid", "test"})


@dataclass(frozen=True)
class ImageFolder:
    """Files of a folder by class, each list sorted by name; without class subfolders ``classes`` is empty.

    ``others`` names subfolders with images that stand beside images of the folder's own and are not counted.
    """

    root: Path
    files: tuple[Path, ...]
    classes: dict[str, tuple[Path, ...]]
    others: tuple[str, ...] = ()


def open_folder(root: Path | str) -> ImageFolder:
    """Find the images of a folder.

    Images directly inside make it a flat folder. Otherwise its subfolders are classes (searched to any depth). A
    folder with a subfolder ``images`` is read there, so that the output of ``retinar generate`` counts without its
    sheet. Raises InputError for a missing or empty folder, and for one that holds splits instead of classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"Expected a folder of images at {root}, found {'a file' if root.exists() else 'nothing'}.")
    inner = root / "images"
    if inner.is_dir() and _images_below(inner):
        root = inner
    direct = tuple(sorted(path for path in root.iterdir() if _is_image(path)))
    classes = {
        folder.name: files
        for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if (files := _images_below(folder))
    }
    if direct:
        return ImageFolder(root, direct, {}, tuple(classes))
    if not classes:
        kinds = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise InputError(f"Expected images ({kinds}) in {root}, found none: check the path.")
    if set(classes) <= SPLITS:
        raise InputError(
            f"Expected images or class subfolders in {root}, found the splits {', '.join(classes)}: "
            f"name one of them, such as {root / next(iter(classes))}."
        )
    return ImageFolder(root, tuple(path for files in classes.values() for path in files), classes)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _images_below(folder: Path) -> tuple[Path, ...]:
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for name in names if _is_image(path := Path(here, name))]
    return tuple(sorted(found))


def read_image(path: Path | str) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a file, converted as clean-fid does it (Pillow's ``convert``).

    Raises ValueError for what that would falsify (more than 8 bits a channel), and what Pillow raises for the rest.
    """
    with Image.open(path) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"{image.mode} pixels, more than 8 bits a channel (`retinar prepare` converts them)")
        return np.array(image.convert("RGB"))


def thin(files: tuple[Path, ...], limit: int | None) -> tuple[Path, ...]:
    """At most ``limit`` files, evenly spaced over the list, so that no source at its head is favoured."""
    if limit is None or len(files) <= limit:
        return files
    return tuple(files[index * len(files) // limit] for index in range(limit))
