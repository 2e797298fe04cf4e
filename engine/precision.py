"""The precisions that one can sample in, by name: what images say of themselves and what a resumed folder compares."""

from __future__ import annotations

from typing import NamedTuple

import torch

from retinar.engine.errors import InputError
from retinar.kernels import ops


class Precision(NamedTuple):
    """``dtype``: of embeddings, norms and what passes between ops, and of matrices and cache unless those are int8.

    int8 matrices have a scale for each output channel, and meet activations that are rounded to int8 row by row; an
    int8 cache has a scale for each head and slot.
    """

    name: str
    dtype: torch.dtype
    int8_weights: bool = False
    int8_cache: bool = False

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.int8 if self.int8_cache else self.dtype


PRECISIONS = {
    each.name: each
    for each in (
        Precision("float32", torch.float32),
        Precision("bfloat16", torch.bfloat16),
        Precision("int8", torch.bfloat16, int8_weights=True),
        Precision("int8-cache", torch.bfloat16, int8_weights=True, int8_cache=True),
    )
}


def find_precision(asked: str | torch.dtype | None, device: torch.device, backend: str | None) -> Precision:
    """A precision by name or dtype; None: bfloat16 on a GPU, float32 on a CPU. InputError for what cannot run there."""
    name = str(asked or ("bfloat16" if device.type == "cuda" else "float32")).removeprefix("torch.")
    if name not in PRECISIONS:
        raise InputError(f"dtype must be one of {', '.join(PRECISIONS)}, got {asked}; choose one of them")
    found = PRECISIONS[name]
    if found.int8_weights and (device.type != "cpu" or backend not in (None, "native")):
        raise InputError(f"dtype {name} runs on a CPU with the compiled module, not on {device}; use bfloat16 there")
    if found.int8_weights and not ops.native_info()["loaded"]:
        raise InputError(f"dtype {name} needs the compiled module: {ops.native_info()['reason']}")
    return found
