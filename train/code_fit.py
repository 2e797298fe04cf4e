"""Whether codes, transformer and tokenizer belong together, and how a config is made to fit codes."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from retinar.engine.checkpoint import digest, load_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.code_files import CodeSet
from retinar.train.config import GPTTrainConfig


def codes_fields(codes: CodeSet) -> dict[str, int]:
    """What codes say about the transformer: vocabulary, grid, number of classes."""
    return {
        "vocab_size": codes.vocab_size,
        "grid": int(codes.meta["grid"]),
        "num_classes": len(codes.meta["classes"]),
    }


def fit_to_codes(config: GPTTrainConfig, codes: CodeSet) -> GPTTrainConfig:
    """``config`` with the codes' vocabulary, grid and classes where the recipe leaves them to the codes."""
    if not config.fit_to_codes:
        return config
    fields: dict[str, Any] = codes_fields(codes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def check_codes(config: GPTTrainConfig, codes: CodeSet) -> None:
    """InputError, with the ``--set`` that mends it, when codes and model differ in vocabulary, grid or classes."""
    wanted = {name: getattr(config.model, name) for name in codes_fields(codes)}
    found = {name: value for name, value in codes_fields(codes).items() if value != wanted[name]}
    if found:
        differences = ", ".join(f"{name} {value} instead of {wanted[name]}" for name, value in found.items())
        mend = " ".join(f"model.{name}={value}" for name, value in found.items())
        raise InputError(f"Expected codes for recipe {config.recipe}, found {differences}: add --set {mend}.")


def number_classes(codes: CodeSet, classes: list[str]) -> None:
    """Number the labels by ``classes``, those of the training codes: a split may lack one. InputError for others."""
    own = codes.meta["classes"]
    if others := [name for name in own if name not in classes]:
        raise InputError(
            f"Expected validation codes of the classes {', '.join(classes)}, found {', '.join(others)} in "
            f"{codes.path}: give those of the same data."
        )
    codes.labels = np.array([classes.index(name) for name in own], np.int64)[codes.labels]
    codes.meta = {**codes.meta, "classes": classes}


def tokenizer_of(path: Path | str, codes: CodeSet) -> VQTokenizer:
    """The tokenizer at ``path``; InputError unless it is the one that made the codes."""
    found, wanted = digest(path), codes.meta.get("tokenizer_digest")
    if wanted is not None and found != wanted:
        raise InputError(
            f"Expected the tokenizer that made the codes (digest {wanted[:12]}), found {found[:12]} at {path}."
        )
    tokenizer = load_tokenizer(path)
    if tokenizer.config.codebook_size != codes.vocab_size:
        raise InputError(
            f"Expected a tokenizer of {codes.vocab_size} codes for {codes.path}, found one of "
            f"{tokenizer.config.codebook_size} at {path}: give the one that made them."
        )
    return tokenizer


def codes_digest(codes: CodeSet) -> str:
    """SHA-256 over codes and labels, read in blocks: the file may be larger than memory."""
    found = hashlib.sha256()
    for first in range(0, len(codes), 4096):
        found.update(np.ascontiguousarray(codes.codes[first : first + 4096]).tobytes())
    found.update(np.ascontiguousarray(codes.labels).tobytes())
    return found.hexdigest()


def default_codes(path: Path | str) -> tuple[Path, Path | None]:
    """(training codes, validation codes or None) for a code folder, or for one that holds train/ and valid/."""
    path = Path(path)
    if (path / "train").is_dir() and not (path / "codes.npy").exists():
        valid = path / "valid"
        return path / "train", valid if valid.is_dir() else None
    return path, None
