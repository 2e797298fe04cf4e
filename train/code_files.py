"""Codes on disk, in two layouts.

packed (ours), a folder for each split::

    codes.npy     uint16 [images, views, T], T = grid * grid codes in raster order
    labels.npy    int64 [images], numbers of meta.json's classes
    meta.json     classes, grid, views, tokenizer and its digest, digests of the photographs and of the files; last

upstream (LlamaGen's ``--code-path``): ``{dataset}{size}_codes/{i}.npy`` int64 [1, views, T] and
``{dataset}{size}_labels/{i}.npy`` int64 [1]; ours come with the meta.json too, LlamaGen's own have none.

While a folder is being written it holds ``.encoding.json``: what is being written, and how many images are done. Such a
folder is never read as codes; writing it again goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write, sha256_file, write_json

FORMAT = 1
META, UNFINISHED = "meta.json", ".encoding.json"
Layout = Literal["packed", "upstream"]
MAX_VOCABULARY = 1 << 16  # uint16
_UPSTREAM = re.compile(r"(?P<dataset>.+?)(?P<size>\d+)_codes")


class CodeSet:
    """The codes of one split: ``codes`` uint16 [images, views, T] (packed: mapped from the file; upstream: in memory),
    ``labels`` int64 [images], ``meta``.

    ``path``: a folder of either layout, or, with ``split``, the folder that holds it. LlamaGen's own folders do not
    say which tokenizer made them nor how many classes there are: ``vocab_size`` (16,384 by default) stands for the one,
    classes are the labels' numbers, ``num_classes`` or more of them.
    Everything is checked here; InputError for what is unfinished, damaged or impossible.
    """

    def __init__(
        self, path: Path | str, split: str | None = None, *, vocab_size: int = 16384, num_classes: int = 1
    ) -> None:
        self.path = Path(path) if split is None else Path(path) / split
        if not self.path.is_dir():
            raise InputError(f"Expected a folder of codes at {self.path}, found none: make it with retinar encode.")
        if (self.path / UNFINISHED).exists():
            raise InputError(
                f"Expected complete codes in {self.path}, found an encoding under way: "
                "run the same retinar encode again."
            )
        self.codes: NDArray[np.uint16]
        self.labels: NDArray[np.int64]
        self.meta: dict[str, Any]
        if upstream_folders(self.path) is not None:
            self.codes, self.labels = read_upstream_codes(self.path)
            stated = self._read_meta() if (self.path / META).exists() else None
            self.meta = stated or _upstream_meta(self.codes, self.labels, vocab_size, num_classes)
        else:
            self.meta = self._read_meta()
            self.codes, self.labels = self._load("codes.npy"), self._load("labels.npy")
        self._check()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def vocab_size(self) -> int:
        """Size of the codebook that the codes index."""
        return int(self.meta["tokenizer_config"]["codebook_size"])

    def _read_meta(self) -> dict[str, Any]:
        file = self.path / META
        try:
            meta = json.loads(file.read_text(encoding="utf-8"))
            whole = isinstance(meta, dict) and meta["kind"] == "codes" and meta["format"] == FORMAT
            if not (whole and meta["classes"] and meta["grid"] >= 1 and meta["tokenizer_config"]["codebook_size"] >= 1):
                raise ValueError
        except FileNotFoundError:
            inner = [name for name in ("train", "valid", "test") if (self.path / name / META).exists()]
            hint = f"did you mean {self.path / inner[0]}?" if inner else "make it with retinar encode."
            raise InputError(f"Expected codes in {self.path}, found no {META}: {hint}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"Expected the description of codes in {file}, found something else: encode again."
            ) from None
        return meta

    def _load(self, name: str) -> Any:
        file = self.path / name
        try:
            array = np.load(file, mmap_mode="r" if name == "codes.npy" else None)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"Expected an array in {file}, found {error}: remove {self.path} and encode again."
            ) from error
        wanted = self.meta.get("sha256", {}).get(name)
        if wanted is not None and sha256_file(file) != wanted:
            raise InputError(
                f"Expected {file} as it was written, found other contents: remove {self.path} and encode again."
            )
        return array

    def _check(self) -> None:
        grid = int(self.meta["grid"])
        shape = self.codes.shape
        if self.codes.dtype != np.uint16 or len(shape) != 3 or not shape[0] or not shape[1] or shape[2] != grid * grid:
            raise InputError(
                f"Expected codes of uint16 [images, views, {grid * grid}] in {self.path}, found {self.codes.dtype} "
                f"{list(shape)}: encode again."
            )
        if self.labels.dtype != np.int64 or self.labels.shape != shape[:1]:
            raise InputError(
                f"Expected labels of int64 [{shape[0]}] in {self.path}, found {self.labels.dtype} "
                f"{list(self.labels.shape)}: encode again."
            )
        highest = int(self.codes.max())
        if highest >= self.vocab_size:
            raise InputError(
                f"Expected codes below {self.vocab_size} in {self.path}, found {highest}: "
                "they belong to another tokenizer."
            )
        classes = len(self.meta["classes"])
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= classes:
            raise InputError(
                f"Expected labels from 0 to {classes - 1} in {self.path}, found {int(self.labels.min())} to "
                f"{int(self.labels.max())}: encode again."
            )


class CodeWriter:
    """Writes one folder in blocks of images, in their order; what is written survives a kill at any moment.

    ``identity``: everything that decides the contents, as JSON values, with ``images``, ``views`` and ``grid``; a
    folder begun or finished with another identity is refused. ``done``: how many images are safely there.
    """

    def __init__(self, path: Path | str, layout: Layout, identity: Mapping[str, Any], *, stem: str = "") -> None:
        self.path, self.layout, self.stem = Path(path), layout, stem
        self.identity = {"layout": layout, **identity, **({"stem": stem} if layout == "upstream" else {})}
        self.shape = (int(identity["images"]), int(identity["views"]), int(identity["grid"]) ** 2)
        self.complete, self.done = False, 0
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"Expected a folder for the codes, found the file {self.path}: choose another --out.")
        self._enter()

    def _enter(self) -> None:
        meta, unfinished = self.path / META, self.path / UNFINISHED
        earlier = unfinished if unfinished.exists() else meta
        if earlier.exists():
            try:
                found = json.loads(earlier.read_text(encoding="utf-8"))
                done = int(found.get("done", self.shape[0]))
            except (ValueError, TypeError, AttributeError):
                raise InputError(
                    f"Expected codes in {self.path}, found a damaged {earlier.name}: remove the folder."
                ) from None
            other = sorted(key for key, value in self.identity.items() if found.get(key) != value)
            if other:
                raise InputError(
                    f"Expected a new folder or codes of the same kind in {self.path}, found codes with another "
                    f"{', '.join(other)}: remove it or choose another --out."
                )
            self.done, self.complete = done, earlier == meta
            return
        if self.path.exists() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            raise InputError(
                f"Expected an empty folder for the codes, found {strangers[0]} in {self.path}: choose another."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._note(0)

    def write(self, codes: NDArray[np.integer], labels: NDArray[np.int64]) -> None:
        """The next images: codes [n, views, T], labels [n]."""
        if self.layout == "packed":
            self._write_packed(codes)
        else:
            for name in ("codes", "labels"):
                (self.path / f"{self.stem}_{name}").mkdir(exist_ok=True)
            for i, (image_codes, label) in enumerate(zip(codes, labels, strict=True), start=self.done):
                _save(self.path / f"{self.stem}_codes" / f"{i}.npy", image_codes[None].astype(np.int64))
                _save(self.path / f"{self.stem}_labels" / f"{i}.npy", np.array([label], np.int64))
        self._note(self.done + len(codes))

    def _write_packed(self, codes: NDArray[np.integer]) -> None:
        # Plain writes: on a full disk they raise OSError, while storing into a mapped file would kill the process.
        # Made anew until a block has been noted: an earlier start may have been killed while making it.
        with open(self.path / "codes.npy", "r+b" if self.done else "wb") as handle:
            if self.done:
                np.lib.format.read_magic(handle)
                np.lib.format.read_array_header_1_0(handle)
            else:
                header = {"descr": "<u2", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(handle, header)
            handle.seek(2 * self.done * self.shape[1] * self.shape[2], os.SEEK_CUR)
            handle.write(codes.astype("<u2").tobytes())
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self, labels: NDArray[np.int64], meta: Mapping[str, Any]) -> None:
        """Write what describes the whole; from here on the folder can be read."""
        digests: dict[str, str] = {}
        if self.layout == "packed":
            _save(self.path / "labels.npy", np.asarray(labels, np.int64))
            digests = {name: sha256_file(self.path / name) for name in ("codes.npy", "labels.npy")}
        described = {"format": FORMAT, "kind": "codes", **self.identity, **meta}
        write_json(self.path / META, described | ({"sha256": digests} if digests else {}))
        (self.path / UNFINISHED).unlink()
        self.complete = True

    def _note(self, done: int) -> None:
        write_json(self.path / UNFINISHED, {**self.identity, "done": done})
        self.done = done


def upstream_folders(path: Path) -> tuple[Path, Path] | None:
    """The folders of codes and labels of LlamaGen's layout inside ``path``, if it has it."""
    found = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and _UPSTREAM.fullmatch(entry.name)]
    if not found:
        return None
    if len(found) > 1:
        raise InputError(
            f"Expected one folder of codes in {path}, found {found[0].name} and {found[1].name}: separate them."
        )
    labels = found[0].with_name(found[0].name.removesuffix("_codes") + "_labels")
    if not labels.is_dir():
        raise InputError(f"Expected {labels.name} beside {found[0].name} in {path}, found none: encode again.")
    return found[0], labels


def read_upstream_codes(path: Path) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """All codes uint16 [images, views, T] and labels int64 [images] of LlamaGen's layout; any number of images."""
    folders = upstream_folders(path)
    assert folders is not None
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


def _upstream_meta(
    codes: NDArray[np.uint16], labels: NDArray[np.int64], vocab_size: int, num_classes: int
) -> dict[str, Any]:
    """What meta.json would say, as far as the files tell."""
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


def _save(path: Path, array: NDArray[Any]) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, array)
        handle.flush()
        os.fsync(handle.fileno())
