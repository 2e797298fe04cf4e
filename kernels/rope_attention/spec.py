"""Spec of rope_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.rope_attention import apply_rope, rope_attention, rope_table

CASES = (
    {"batch": 1, "heads": 1, "groups": 1, "positions": 1, "dim": 4},
    {"batch": 2, "heads": 3, "groups": 1, "positions": 7, "dim": 20},
    {"batch": 1, "heads": 4, "groups": 2, "positions": 37, "dim": 100},
    {"batch": 2, "heads": 2, "groups": 2, "positions": 65, "dim": 64},
    {"batch": 1, "heads": 2, "groups": 1, "positions": 33, "dim": 128},
)


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    batch, positions, dim = case["batch"], case["positions"], case["dim"]
    side = 1 + int(positions**0.5)
    return {
        "q": normal(generator, dtype, batch, case["heads"], positions, dim),
        "k": normal(generator, dtype, batch, case["groups"], positions, dim),
        "v": normal(generator, dtype, batch, case["groups"], positions, dim),
        "rope": rope_table(side, side, dim),
    }


def _plain(i: Inputs) -> tuple[Tensor]:
    heads, positions, dim = i["q"].shape[1:]
    repeats = heads // i["k"].shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (apply_rope(i["k"], i["rope"]), i["v"]))
    future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    scores = (apply_rope(i["q"], i["rope"]) @ k.mT * dim**-0.5).masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ v,)


def _bytes(case: Case, size: int) -> int:
    tokens = case["batch"] * case["positions"]
    return tokens * (2 * case["heads"] + 2 * case["groups"]) * case["dim"] * size


def _flops(case: Case) -> int:
    """Two products over the lower triangle; the rotation and the softmax are not counted."""
    pairs = case["positions"] * (case["positions"] + 1) // 2
    return 4 * case["batch"] * case["heads"] * pairs * case["dim"]


ROPE_ATTENTION = OpSpec(
    name="rope_attention",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=lambda i, backend: (rope_attention(i["q"], i["k"], i["v"], i["rope"], backend=backend),),
    plain=_plain,
    gradients=("q", "k", "v"),
    bytes=_bytes,
    flops=_flops,
)
