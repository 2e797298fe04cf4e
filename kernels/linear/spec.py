"""Spec of linear."""

from __future__ import annotations

import torch

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.linear import linear
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal

CASES = (
    {"rows": 1, "inner": 1, "outer": 1},
    {"rows": 3, "inner": 33, "outer": 77},
    {"rows": 31, "inner": 100, "outer": 257},
    {"rows": 33, "inner": 256, "outer": 768},
)


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {
        "x": normal(generator, dtype, case["rows"], case["inner"]),
        "weight": normal(generator, dtype, case["outer"], case["inner"], scale=case["inner"] ** -0.5),
    }


LINEAR = OpSpec(
    name="linear",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=lambda i, backend: (linear(i["x"], i["weight"], backend=backend),),
    narrow={"triton": kernel_dtypes(products=True)},
    plain=lambda i: (torch.nn.functional.linear(i["x"], i["weight"]),),
    bytes=lambda c, size: (c["rows"] * (c["inner"] + c["outer"]) + c["inner"] * c["outer"]) * size,
    flops=lambda c: 2 * c["rows"] * c["inner"] * c["outer"],
)
