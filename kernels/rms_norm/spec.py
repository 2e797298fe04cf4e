"""Specs of rms_norm and add_rms_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
NARROW = {"native": (torch.float32, torch.bfloat16), "triton": kernel_dtypes(products=True)}
CASES = (
    {"rows": 1, "width": 1},
    {"rows": 1, "width": 7},
    {"rows": 3, "width": 67},
    {"rows": 5, "width": 100},
    {"rows": 2, "width": 256},
    {"rows": 17, "width": 1280},
    {"rows": 3, "width": 2560},
    {"rows": 5, "width": 1999},  # a prime beyond one block
    {"rows": 2, "width": 8200},  # wider than any row that a GPU's registers hold
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
    narrow=NARROW,
    bytes=lambda c, size: (2 * c["rows"] + 1) * c["width"] * size,
    flops=lambda c: c["rows"] * (4 * c["width"] + 3),
    backward_bytes=lambda c, size: (3 * c["rows"] + 2) * c["width"] * size,
    backward_flops=lambda c: c["rows"] * (11 * c["width"] + 5),
)
ADD_RMS_NORM = OpSpec(
    name="add_rms_norm",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs_add,
    run=lambda i, backend: add_rms_norm(i["x"], i["residual"], i["weight"], EPS, backend=backend),
    plain=_plain_add,
    gradients=("x", "residual", "weight"),
    narrow=NARROW,
    bytes=lambda c, size: (4 * c["rows"] + 1) * c["width"] * size,
    flops=lambda c: c["rows"] * (5 * c["width"] + 3),
    backward_bytes=lambda c, size: (4 * c["rows"] + 2) * c["width"] * size,  # x and residual get one gradient
    backward_flops=lambda c: c["rows"] * (12 * c["width"] + 5),
)
