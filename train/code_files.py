"""Codes to train on, read from either layout of ``code_layout`` and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file
from retinar.train.code_layout import (
    FORMAT,
    MAX_VOCABULARY,
    META,
    Layout,
    find_stem,
    meta_file,
    note_file,
    read_upstream_codes,
    upstream_meta,
)
from retinar.train.code_writer import CodeWriter

__all__ = ["MAX_VOCABULARY", "CodeSet", "CodeWriter", "Layout"]


class CodeSet:
    """The codes of one split: ``codes`` uint16 [images, views, T] (packed: mapped from the file; upstream: in memory),
    ``labels`` int64 [images], ``meta``.

    ``path``: a folder of either layout, or, with ``split``, the folder that holds it. ``stem`` ("imagenet256") chooses
    among several of upstream's. LlamaGen's own folders do not say which tokenizer made them nor how many classes there
    are: ``vocab_size`` (16,384 by default) stands for the one, classes are the labels' numbers, ``num_classes`` or more
    of them. Everything is checked here; InputError for what is unfinished, damaged or impossible.
    """

    def __init__(
        self,
        path: Path | str,
        split: str | None = None,
        *,
        stem: str | None = None,
        vocab_size: int = 16384,
        num_classes: int = 1,
    ) -> None:
        self.path = Path(path) if split is None else Path(path) / split
        if not self.path.is_dir():
            raise InputError(f"Expected a folder of codes at {self.path}, found none: make it with retinar encode.")
        self.stem = find_stem(self.path, stem)
        if note_file(self.path, self.stem).exists():
            raise InputError(
                f"Expected complete codes in {self.path}, found an encoding under way: "
                "run the same retinar encode again."
            )
        self.codes: NDArray[np.uint16]
        self.labels: NDArray[np.int64]
        self.meta: dict[str, Any]
        if self.stem is not None:
            self.codes, self.labels = read_upstream_codes(self.path, self.stem)
            stated = self._read_meta() if meta_file(self.path, self.stem).exists() else None
            self.meta = stated or upstream_meta(self.codes, self.labels, vocab_size, num_classes)
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
        file = meta_file(self.path, self.stem)
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
