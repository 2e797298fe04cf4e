"""Spec of rope_attention."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.rope_attention import apply_rope, rope_attention, rope_table
from retinar.kernels.rope_attention.reference import dropout_mask, split_packed

CASES = (
    {"batch": 1, "heads": 1, "groups": 1, "positions": 1, "dim": 4},
    {"batch": 2, "heads": 3, "groups": 1, "positions": 7, "dim": 20},
    {"batch": 1, "heads": 4, "groups": 2, "positions": 37, "dim": 100},
    {"batch": 2, "heads": 2, "groups": 2, "positions": 65, "dim": 64},
    {"batch": 1, "heads": 2, "groups": 1, "positions": 33, "dim": 128},
    {"batch": 1, "heads": 2, "groups": 1, "positions": 77, "dim": 32},
)
SEED = 0x5EED_0123_4567


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    batch, positions, dim = case["batch"], case["positions"], case["dim"]
    side = 1 + int(positions**0.5)
    return {
        "q": normal(generator, dtype, batch, case["heads"], positions, dim),
        "k": normal(generator, dtype, batch, case["groups"], positions, dim),
        "v": normal(generator, dtype, batch, case["groups"], positions, dim),
        "rope": rope_table(side, side, dim),
        "dropout_p": case.get("dropout", 0) / 100,  # in percent, for benchmarks: not every backend can drop
    }


def _plain(i: Inputs) -> tuple[Tensor]:
    batch, heads, positions, dim = i["q"].shape
    repeats = heads // i["k"].shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (apply_rope(i["k"], i["rope"]), i["v"]))
    future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    scores = (apply_rope(i["q"], i["rope"]) @ k.mT * dim**-0.5).masked_fill(future, float("-inf"))
    probabilities = scores.softmax(-1)
    if i["dropout_p"] > 0:
        seed = torch.tensor(SEED, device=i["q"].device)
        masks = [dropout_mask(seed, b, heads, positions, i["dropout_p"]) for b in range(batch)]
        probabilities = probabilities * torch.stack(masks).to(probabilities.dtype)
    return (probabilities @ v,)


def _run(i: Inputs, backend: str | None) -> tuple[Tensor]:
    settings = {"dropout_p": i["dropout_p"], "seed": SEED, "backend": backend}
    return (rope_attention(i["q"], i["k"], i["v"], i["rope"], **settings),)


def _bytes(case: Case, size: int) -> int:
    tokens = case["batch"] * case["positions"]
    return tokens * (2 * case["heads"] + 2 * case["groups"]) * case["dim"] * size


def _backward_bytes(case: Case, size: int) -> int:
    """q, k, v, the output and its gradient read; three gradients written."""
    tokens = case["batch"] * case["positions"]
    return tokens * (4 * case["heads"] + 4 * case["groups"]) * case["dim"] * size


def _flops(case: Case) -> int:
    """Two products over the lower triangle; the rotation and the softmax are not counted."""
    pairs = case["positions"] * (case["positions"] + 1) // 2
    return 4 * case["batch"] * case["heads"] * pairs * case["dim"]


ROPE_ATTENTION = OpSpec(
    name="rope_attention",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=_run,
    plain=_plain,
    gradients=("q", "k", "v"),
    narrow={"triton": kernel_dtypes(products=True), "flash": (torch.bfloat16, torch.float16)},
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=lambda c: 5 * _flops(c) // 2,  # the scores again, and four products for the gradients
)


def _packed_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    parts = _inputs(case, dtype, generator)
    qkv = torch.cat([parts.pop(name) for name in ("q", "k", "v")], 1).transpose(1, 2).contiguous()
    return {"qkv": qkv, **parts, "heads": case["heads"]}


def _unpacked(i: Inputs) -> Inputs:
    q, k, v = split_packed(i["qkv"], i["heads"])
    return {**i, "q": q, "k": k, "v": v}


def _packed_run(i: Inputs, backend: str | None) -> tuple[Tensor]:
    settings = {"heads": i["heads"], "dropout_p": i["dropout_p"], "seed": SEED, "backend": backend}
    return (rope_attention(i["qkv"], None, None, i["rope"], **settings),)


ROPE_ATTENTION_PACKED = dataclasses.replace(
    ROPE_ATTENTION,
    name="rope_attention_packed",
    cases=CASES[:5],
    inputs=_packed_inputs,
    run=_packed_run,
    plain=lambda i: _plain(_unpacked(i)),
    gradients=("qkv",),
)
