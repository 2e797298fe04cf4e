"""Codes on disk, in two layouts.

packed (ours), a folder for each split::

    codes.npy     uint16 [images, views, T], T = grid * grid codes in raster order
    labels.npy    int64 [images], numbers of meta.json's classes
    meta.json     classes, grid, views, tokenizer and its digest, digests of the photographs and of the files; last

upstream (LlamaGen's ``--code-path``), one pair of folders for each STEM = {dataset}{size}::

    STEM_codes/{i}.npy     int64 [1, views, T]
    STEM_labels/{i}.npy    int64 [1]
    STEM_meta.json         as meta.json; LlamaGen's own folders have none

While codes are being written there is a note of what they are, ``.encoding.json`` or ``.STEM_encoding.json``, and such
a folder is never read as codes. Packed codes wait in ``.encoding/`` until all are there. See ``code_writer``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retinar.engine.errors import InputError

FORMAT = 1
Layout = Literal["packed", "upstream"]
MAX_VOCABULARY = 1 << 16  # uint16
META = "meta.json"
_UPSTREAM = re.compile(r"(?P<stem>.+?\d+)_codes")


def meta_file(path: Path, stem: str | None) -> Path:
    """What describes the codes in ``path``: the packed ones, or those of a stem."""
    return path / (META if stem is None else f"{stem}_{META}")


def note_file(path: Path, stem: str | None) -> Path:
    """What is there while codes are being written."""
    return path / (".encoding.json" if stem is None else f".{stem}_encoding.json")


def upstream_folders(path: Path, stem: str) -> tuple[Path, Path]:
    """The folders of codes and of labels of a stem."""
    return path / f"{stem}_codes", path / f"{stem}_labels"


def find_stem(path: Path, stem: str | None = None) -> str | None:
    """The stem of the upstream layout inside ``path``; None: there is none. ``stem`` chooses among several.

    InputError for several without a choice, for another one than asked for, and for codes without labels.
    """
    matches = (_UPSTREAM.fullmatch(entry.name) for entry in path.iterdir() if entry.is_dir())
    found = sorted(match["stem"] for match in matches if match)
    if stem is not None:
        if found and stem not in found:
            raise InputError(f"Expected the folder {stem}_codes in {path}, found {found[0]}_codes: encode that size.")
        found = [stem] if found else []
    if not found:
        return None
    if len(found) > 1:
        raise InputError(
            f"Expected one folder of codes in {path}, found {found[0]}_codes and {found[1]}_codes: separate them."
        )
    _, labels = upstream_folders(path, found[0])
    if not labels.is_dir():
        raise InputError(f"Expected {labels.name} beside {found[0]}_codes in {path}, found none: encode again.")
    return found[0]


def read_upstream_codes(path: Path, stem: str) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """All codes uint16 [images, views, T] and labels int64 [images] of LlamaGen's layout; any number of images."""
    folders = upstream_folders(path, stem)
    numbers = sorted(int(file.stem) for file in folders[0].glob("*.npy") if file.stem.isdigit())
    if not numbers:
        raise InputError(f"Expected files 0.npy, 1.npy, … in {folders[0]}, found none: encode again.")
    codes: list[NDArray[np.uint16]] = []
    labels: list[int] = []
    for number in numbers:
        try:
            image, label = (np.load(folder / f"{number}.npy") for folder in folders)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"Expected an array in {number}.npy of {path}, found {error}: encode again.") from error
        whole = image.ndim == 3 and len(image) == 1 and np.issubdtype(image.dtype, np.integer) and label.shape == (1,)
        if not whole or (codes and image[0].shape != codes[0].shape):
            raise InputError(
                f"Expected whole numbers [1, views, T] and a label [1], alike in all files of {path}, found "
                f"{image.dtype} {list(image.shape)} and {list(label.shape)} in {number}.npy: encode again."
            )
        if int(image.min()) < 0 or int(image.max()) >= MAX_VOCABULARY:
            raise InputError(
                f"Expected codes from 0 to {MAX_VOCABULARY - 1} in {number}.npy of {path}, found {int(image.min())} to "
                f"{int(image.max())}: encode again."
            )
        codes.append(image[0].astype(np.uint16))
        labels.append(int(label[0]))
    return np.stack(codes), np.array(labels, np.int64)


def upstream_meta(
    codes: NDArray[np.uint16], labels: NDArray[np.int64], vocab_size: int, num_classes: int
) -> dict[str, Any]:
    """What the description of LlamaGen's own folders would say, as far as the files tell."""
    return {
        "format": FORMAT,
        "kind": "codes",
        "layout": "upstream",
        "classes": [str(label) for label in range(max(num_classes, int(labels.max()) + 1))],
        "grid": math.isqrt(codes.shape[2]),
        "images": len(codes),
        "views": codes.shape[1],
        "split": None,
        "tokenizer_config": {"codebook_size": vocab_size},
        "tokenizer_digest": None,
    }
