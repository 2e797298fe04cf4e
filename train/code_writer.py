"""Writing codes: in blocks of images, by any number of processes, in any order, through any interruption.

A block is whole or absent; which blocks are there is all the state there is. Blocks are cut alike for any number of
processes, and nothing in a finished folder tells who wrote what or when: its bytes are those of one process that was
never interrupted.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write, sha256_file, write_json
from retinar.train.code_layout import FORMAT, Layout, meta_file, note_file, upstream_folders

BLOCK = 32
"""Images of a block, at most: what a kill costs."""
BLOCKS = 64
"""Into which a small set is cut, so that many processes share it."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of codes [``images``, ``views``, ``length``] in ``path``, ``size`` images each (the last has fewer).

    A block is named by its first image. Files are renamed into place but not forced to the disk one by one, which would
    cost more than the encoding: what a power cut has emptied has another length, and is missing.
    """

    path: Path
    stem: str | None
    images: int
    views: int
    length: int
    size: int

    def span(self, first: int) -> range:
        """The images of a block."""
        return range(first, min(first + self.size, self.images))

    def write(self, first: int, codes: NDArray[np.integer], labels: NDArray[np.int64]) -> None:
        """One block: codes [n, views, length], labels [n]. OSError as the file system has it."""
        if self.stem is None:
            _put(self._packed(first), codes.astype("<u2").tobytes())
            return
        codes_folder, labels_folder = upstream_folders(self.path, self.stem)
        for i, image_codes, label in zip(self.span(first), codes, labels, strict=True):
            _put(codes_folder / f"{i}.npy", _npy(image_codes[None].astype(np.int64)))
            _put(labels_folder / f"{i}.npy", _npy(np.array([label], np.int64)))

    def missing(self) -> list[int]:
        """The blocks that are not there, in order."""
        firsts = range(0, self.images, self.size)
        if self.stem is None:
            bytes_an_image = 2 * self.views * self.length
            there = _sizes(self._packed(0).parent)
            return [n for n in firsts if there.get(self._packed(n).name) != len(self.span(n)) * bytes_an_image]
        wanted = [len(_npy(np.zeros(shape, np.int64))) for shape in ((1, self.views, self.length), (1,))]
        sizes = [_sizes(folder) for folder in upstream_folders(self.path, self.stem)]
        whole = [[found.get(f"{i}.npy") for found in sizes] == wanted for i in range(self.images)]
        return [n for n in firsts if not all(whole[i] for i in self.span(n))]

    def begin(self) -> None:
        """Make the folders."""
        folders = (self._packed(0).parent,) if self.stem is None else upstream_folders(self.path, self.stem)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

    def join(self) -> None:
        """All blocks are there: packed ones become codes.npy, and all lie safely on the disk."""
        if self.stem is not None:
            for folder in upstream_folders(self.path, self.stem):
                for leftover in folder.glob(".*.partial"):  # of a killed process
                    leftover.unlink()
            os.sync()
            return
        with atomic_write(self.path / "codes.npy") as temporary, open(temporary, "wb") as whole:
            header = {"descr": "<u2", "fortran_order": False, "shape": (self.images, self.views, self.length)}
            np.lib.format.write_array_header_1_0(whole, header)
            for first in range(0, self.images, self.size):
                with open(self._packed(first), "rb") as block:
                    shutil.copyfileobj(block, whole)

    def clear(self) -> None:
        """Remove what only the work needed."""
        if self.stem is None:
            shutil.rmtree(self._packed(0).parent, ignore_errors=True)

    def _packed(self, first: int) -> Path:
        return self.path / ".encoding" / f"{first:09d}"


class CodeWriter:
    """One folder of codes: begun, or taken up where it was left. For the process that watches over the others.

    ``identity``: everything that decides the contents, as JSON values, with ``images``, ``views`` and ``grid``; what
    was begun or finished with another identity is refused. ``blocks`` goes to whoever writes; ``complete``: there is
    nothing to do.
    """

    def __init__(self, path: Path | str, layout: Layout, identity: Mapping[str, Any], *, stem: str = "") -> None:
        self.path, self.stem = Path(path), stem if layout == "upstream" else None
        self.identity = {"layout": layout, **identity, **({"stem": stem} if layout == "upstream" else {})}
        self.meta, self.note = meta_file(self.path, self.stem), note_file(self.path, self.stem)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"Expected a folder for the codes, found the file {self.path}: choose another --out.")
        self.complete = self.meta.exists()
        shape = (int(identity["images"]), int(identity["views"]), int(identity["grid"]) ** 2)
        size = self._begun(max(1, min(BLOCK, shape[0] // BLOCKS)))
        self.blocks = Blocks(self.path, self.stem, *shape, size=size)
        if self.complete:
            self._clear()
        else:
            self.blocks.begin()

    def write(self, codes: NDArray[np.integer], labels: NDArray[np.int64]) -> None:
        """All codes [images, views, T] and labels [images] at once."""
        for first in self.blocks.missing():
            span = self.blocks.span(first)
            self.blocks.write(first, codes[span.start : span.stop], labels[span.start : span.stop])

    def finish(self, labels: NDArray[np.int64], meta: Mapping[str, Any]) -> None:
        """All blocks are there: write what describes the whole; from here on the folder can be read."""
        self.blocks.join()
        digests: dict[str, str] = {}
        if self.stem is None:
            with atomic_write(self.path / "labels.npy") as temporary:
                temporary.write_bytes(_npy(np.asarray(labels, np.int64)))
            digests = {name: sha256_file(self.path / name) for name in ("codes.npy", "labels.npy")}
        described = {"format": FORMAT, "kind": "codes", **self.identity, **meta}
        write_json(self.meta, described | ({"sha256": digests} if digests else {}))
        self.complete = True
        self._clear()

    def _begun(self, size: int) -> int:
        """Claim the folder for blocks of ``size`` images, or check that it is ours; the size that it has."""
        earlier = self.meta if self.complete else self.note
        if earlier.exists():
            return self._checked(earlier)
        self._refuse_strangers()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.note, {**self.identity, "block": size})
        return size

    def _checked(self, earlier: Path) -> int:
        try:
            found = json.loads(earlier.read_text(encoding="utf-8"))
            size = 1 if self.complete else int(found["block"])
            if not isinstance(found, dict) or size < 1:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"Expected codes in {self.path}, found a damaged {earlier.name}: remove the folder."
            ) from None
        other = sorted(key for key, value in self.identity.items() if found.get(key) != value)
        if other:
            raise InputError(
                f"Expected a new folder or codes of the same kind in {self.path}, found codes with another "
                f"{', '.join(other)}: remove them or choose another folder."
            )
        return size

    def _refuse_strangers(self) -> None:
        """Of upstream's layout a folder may hold several stems, and anything else beside them."""
        if not self.path.exists():
            return
        if self.stem is None:
            strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        elif meta_file(self.path, None).exists() or note_file(self.path, None).exists():
            raise InputError(
                f"Expected a new folder or codes of the same kind in {self.path}, found codes with another layout: "
                "choose another folder."
            )
        else:
            strangers = [folder.name for folder in upstream_folders(self.path, self.stem) if folder.exists()]
        if strangers:
            raise InputError(
                f"Expected no other files in the way of the codes, found {strangers[0]} in {self.path}: remove it or "
                "choose another folder."
            )

    def _clear(self) -> None:
        self.blocks.clear()
        self.note.unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _sizes(folder: Path) -> dict[str, int]:
    """Name and length of each file."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}
    except FileNotFoundError:
        return {}
