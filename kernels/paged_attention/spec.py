"""Spec of paged_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.paged_attention import paged_attention
from retinar.kernels.rope_attention import rope_table, rotate

CASES = (
    {"batch": 1, "heads": 1, "groups": 1, "dim": 4, "page": 1, "position": 0},
    {"batch": 3, "heads": 3, "groups": 1, "dim": 20, "page": 5, "position": 12},
    {"batch": 5, "heads": 4, "groups": 2, "dim": 100, "page": 16, "position": 40},
    {"batch": 2, "heads": 2, "groups": 2, "dim": 64, "page": 64, "position": 63},
    {"batch": 2, "heads": 2, "groups": 2, "dim": 128, "page": 32, "position": 140},
    {"batch": 1, "heads": 4, "groups": 2, "dim": 32, "page": 16, "position": 270},
)
#: Rows of GPT-XL's heads that end in their last split of several.
DEVICE_CASES = ({"batch": 3, "heads": 20, "groups": 20, "dim": 64, "page": 256, "position": 1000},)


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Rows at different positions, the last at ``position``; pages in random order; unused slots hold NaN."""
    batch, heads, groups, dim = case["batch"], case["heads"], case["groups"], case["dim"]
    page, last = case["page"], case["position"]
    columns = last // page + 1
    positions = torch.tensor([last * (b + 1) // batch for b in range(batch)], dtype=torch.int32)
    table = torch.randperm(batch * columns + 1, generator=generator)[: batch * columns].view(batch, columns).int()
    caches = [torch.full((batch * columns + 1, page, groups, dim), float("nan"), dtype=dtype) for _ in range(2)]
    for row in range(batch):
        place = torch.arange(int(positions[row]))
        for cache in caches:
            old = normal(generator, dtype, len(place), groups, dim)
            cache[table[row, place // page].long(), place % page] = old
    side = 1 + int(last**0.5)
    return {
        "q": normal(generator, dtype, batch, heads, dim),
        "k": normal(generator, dtype, batch, groups, dim),
        "v": normal(generator, dtype, batch, groups, dim),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "block_table": table,
        "positions": positions,
        "rope": rope_table(side, side, dim),
    }


def _run(i: Inputs, backend: str | None) -> tuple[Tensor, ...]:
    """The output and, of the caches, the written slots."""
    k_cache, v_cache = i["k_cache"].clone(), i["v_cache"].clone()
    out = paged_attention(
        i["q"], i["k"], i["v"], k_cache, v_cache, i["block_table"], i["positions"], i["rope"], backend=backend
    )
    return out, *_written(i, k_cache, v_cache)


def _plain(i: Inputs) -> tuple[Tensor, ...]:
    k_cache, v_cache = i["k_cache"].clone(), i["v_cache"].clone()
    heads, dim = i["q"].shape[1:]
    page = k_cache.shape[1]
    out = torch.empty_like(i["q"])
    for row, position in enumerate(i["positions"].tolist()):
        place = torch.arange(position + 1)
        where = i["block_table"][row, place // page].long(), place % page
        angles = i["rope"][position][None]
        k_cache[where[0][-1], where[1][-1]] = rotate(i["k"][row], angles)
        v_cache[where[0][-1], where[1][-1]] = i["v"][row]
        k, v = (c[where].transpose(0, 1).repeat_interleave(heads // i["k"].shape[1], 0) for c in (k_cache, v_cache))
        scores = rotate(i["q"][row], angles)[:, None] @ k.mT * dim**-0.5
        out[row] = (scores.softmax(-1) @ v)[:, 0]
    return out, *_written(i, k_cache, v_cache)


def _written(i: Inputs, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    page, positions = k_cache.shape[1], i["positions"].long()
    where = i["block_table"].gather(1, (positions // page)[:, None])[:, 0].long(), positions % page
    return k_cache[where], v_cache[where]


def _past(case: Case) -> int:
    return sum(case["position"] * (b + 1) // case["batch"] + 1 for b in range(case["batch"]))


def _bytes(case: Case, size: int) -> int:
    new = case["batch"] * (2 * case["heads"] + 4 * case["groups"])
    return (new + 2 * _past(case) * case["groups"]) * case["dim"] * size


PAGED_ATTENTION = OpSpec(
    name="paged_attention",
    cases=CASES,
    device_cases=DEVICE_CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=_run,
    plain=_plain,
    narrow={"triton": kernel_dtypes(products=True), "flash": (torch.bfloat16, torch.float16)},
    bytes=_bytes,
    flops=lambda c: 4 * _past(c) * c["heads"] * c["dim"],
)
