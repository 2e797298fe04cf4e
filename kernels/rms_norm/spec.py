"""Specs of rms_norm and add_rms_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
NATIVE = {"native": (torch.float32, torch.bfloat16)}
CASES = (
    {"rows": 1, "width": 1},
    {"rows": 1, "width": 7},
    {"rows": 3, "width": 67},
    {"rows": 5, "width": 100},
    {"rows": 2, "width": 256},
    {"rows": 17, "width": 1280},
)


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    rows, width = case["rows"], case["width"]
    return {
        "x": normal(generator, dtype, rows, width, scale=3.0),
        "weight": (1 + normal(generator, torch.float32, width, scale=0.3)).to(dtype),
    }


def _inputs_add(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    residual = normal(generator, dtype, case["rows"], case["width"])
    return {**_inputs(case, dtype, generator), "residual": residual}


def _plain(i: Inputs) -> tuple[Tensor]:
    return (F.rms_norm(i["x"], i["weight"].shape, i["weight"], EPS),)


def _plain_add(i: Inputs) -> tuple[Tensor, Tensor]:
    residual = i["x"] + i["residual"]
    return F.rms_norm(residual, i["weight"].shape, i["weight"], EPS), residual


RMS_NORM = OpSpec(
    name="rms_norm",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=lambda i, backend: (rms_norm(i["x"], i["weight"], EPS, backend=backend),),
    plain=_plain,
    gradients=("x", "weight"),
    narrow=NATIVE,
    bytes=lambda c, size: (2 * c["rows"] + 1) * c["width"] * size,
    flops=lambda c: c["rows"] * (4 * c["width"] + 3),
)
ADD_RMS_NORM = OpSpec(
    name="add_rms_norm",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs_add,
    run=lambda i, backend: add_rms_norm(i["x"], i["residual"], i["weight"], EPS, backend=backend),
    plain=_plain_add,
    gradients=("x", "residual", "weight"),
    narrow=NATIVE,
    bytes=lambda c, size: (4 * c["rows"] + 1) * c["width"] * size,
    flops=lambda c: c["rows"] * (5 * c["width"] + 3),
)
