"""Specs of swiglu: on two tensors, and packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.swiglu import swiglu

CASES = (
    {"rows": 1, "width": 1},
    {"rows": 3, "width": 13},
    {"rows": 5, "width": 127},
    {"rows": 2, "width": 1024},
    {"rows": 33, "width": 2048},
    {"rows": 7, "width": 1288},
)


def _pair(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    shape = case["rows"], case["width"]
    return {"gate": normal(generator, dtype, *shape, scale=3.0), "up": normal(generator, dtype, *shape)}


def _packed(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"gate_up": normal(generator, dtype, case["rows"], 2 * case["width"], scale=2.0)}


def _bytes(case: Case, size: int) -> int:
    return 3 * case["rows"] * case["width"] * size


def _backward_bytes(case: Case, size: int) -> int:
    return 5 * case["rows"] * case["width"] * size


def _flops(case: Case) -> int:
    return 5 * case["rows"] * case["width"]  # exp, add, divide, two products


SWIGLU = OpSpec(
    name="swiglu",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_pair,
    run=lambda i, backend: (swiglu(i["gate"], i["up"], backend=backend),),
    plain=lambda i: (F.silu(i["gate"]) * i["up"],),
    gradients=("gate", "up"),
    narrow={"triton": kernel_dtypes()},
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=lambda c: 12 * c["rows"] * c["width"],
)
SWIGLU_PACKED = OpSpec(
    name="swiglu_packed",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_packed,
    run=lambda i, backend: (swiglu(i["gate_up"], backend=backend),),
    plain=lambda i: (F.silu(i["gate_up"].chunk(2, -1)[0]) * i["gate_up"].chunk(2, -1)[1],),
    gradients=("gate_up",),
    narrow={"triton": kernel_dtypes()},
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=lambda c: 12 * c["rows"] * c["width"],
)
