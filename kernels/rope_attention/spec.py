"""Spec of rope_attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


def attention_parts(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, heads, N, D] of a case's arguments, which may be one packed projection."""
    return split_packed(i["qkv"], i["heads"]) if "qkv" in i else (i["q"], i["k"], i["v"])


def plain_attention(i: Inputs, drop: Callable[[Tensor], Tensor]) -> tuple[Tensor]:
    """Rotated causal attention in plain torch, in the inputs' dtype; ``drop`` takes the probabilities [B, H, N, N]."""
    q, k, v = attention_parts(i)
    heads, positions, dim = q.shape[1:]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (apply_rope(k, i["rope"]), v))
    future = torch.ones(positions, positions, dtype=torch.bool, device=q.device).triu(1)
    scores = (apply_rope(q, i["rope"]) @ k.mT * dim**-0.5).masked_fill(future, float("-inf"))
    return (drop(scores.softmax(-1)) @ v,)


def _plain(i: Inputs) -> tuple[Tensor]:
    def documented(probabilities: Tensor) -> Tensor:
        if i["dropout_p"] == 0:
            return probabilities
        batch, heads, positions, _ = probabilities.shape
        seed = torch.tensor(SEED, device=probabilities.device)
        masks = [dropout_mask(seed, b, heads, positions, i["dropout_p"]) for b in range(batch)]
        return probabilities * torch.stack(masks).to(probabilities.dtype)

    return plain_attention(i, documented)


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


def _packed_run(i: Inputs, backend: str | None) -> tuple[Tensor]:
    settings = {"heads": i["heads"], "dropout_p": i["dropout_p"], "seed": SEED, "backend": backend}
    return (rope_attention(i["qkv"], None, None, i["rope"], **settings),)


ROPE_ATTENTION_PACKED = dataclasses.replace(
    ROPE_ATTENTION,
    name="rope_attention_packed",
    cases=CASES[:5],
    inputs=_packed_inputs,
    run=_packed_run,
    gradients=("qkv",),
)
