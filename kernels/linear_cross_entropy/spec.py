"""Spec of linear_cross_entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.linear_cross_entropy import linear_cross_entropy
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal

CASES = (
    {"tokens": 1, "width": 1, "vocabulary": 1},
    {"tokens": 7, "width": 33, "vocabulary": 101},
    {"tokens": 65, "width": 64, "vocabulary": 1024},
    {"tokens": 131, "width": 24, "vocabulary": 2048},
)


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    targets = torch.randint(case["vocabulary"], (case["tokens"],), generator=generator)
    targets[3::5] = -100
    return {
        "hidden": normal(generator, dtype, case["tokens"], case["width"]),
        "weight": normal(generator, dtype, case["vocabulary"], case["width"], scale=2 * case["width"] ** -0.5),
        "targets": targets,
    }


def _plain(i: Inputs) -> tuple[Tensor]:
    return (F.cross_entropy(F.linear(i["hidden"], i["weight"]).float(), i["targets"]),)


def _bytes(case: Case, size: int) -> int:
    return (case["tokens"] + case["vocabulary"]) * case["width"] * size + 8 * case["tokens"]


def _backward_bytes(case: Case, size: int) -> int:
    return 2 * (case["tokens"] + case["vocabulary"]) * case["width"] * size + 8 * case["tokens"]


LINEAR_CROSS_ENTROPY = OpSpec(
    name="linear_cross_entropy",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=lambda i, backend: (linear_cross_entropy(i["hidden"], i["weight"], i["targets"], backend=backend),),
    plain=_plain,
    gradients=("hidden", "weight"),
    narrow={"triton": kernel_dtypes()},
    bytes=_bytes,
    flops=lambda c: 2 * c["tokens"] * c["width"] * c["vocabulary"],
    backward_bytes=_backward_bytes,
    backward_flops=lambda c: 4 * c["tokens"] * c["width"] * c["vocabulary"],  # a chunk's logits are still at hand
)
