"""Spec of linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.linear import linear
from retinar.kernels.numerics import wide
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal

#: norm: in front; gate, residual, wide: behind (1 or absent).
CASES: tuple[Case, ...] = (
    {"rows": 1, "inner": 1, "outer": 1},
    {"rows": 3, "inner": 33, "outer": 77},
    {"rows": 31, "inner": 100, "outer": 257},
    {"rows": 33, "inner": 256, "outer": 768},
    {"rows": 2, "inner": 64, "outer": 96, "norm": 1},
    {"rows": 65, "inner": 33, "outer": 17, "norm": 1, "wide": 1},
    {"rows": 5, "inner": 136, "outer": 70, "norm": 1, "gate": 1},
    {"rows": 66, "inner": 64, "outer": 128, "gate": 1},
    {"rows": 7, "inner": 72, "outer": 40, "residual": 1},
    {"rows": 3, "inner": 20, "outer": 33, "norm": 1, "residual": 1},
)
#: The products of a GPT-XL step: every tile of the wide weights, with its pipeline full.
DEVICE_CASES: tuple[Case, ...] = (
    {"rows": 65, "inner": 1280, "outer": 3840, "norm": 1},
    {"rows": 3, "inner": 1280, "outer": 1280, "residual": 1},
    {"rows": 65, "inner": 1280, "outer": 7168, "norm": 1, "gate": 1},
    {"rows": 3, "inner": 3584, "outer": 1280, "residual": 1},
    {"rows": 65, "inner": 1280, "outer": 16384, "norm": 1, "wide": 1},
)
EPS = 1e-5


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    rows, inner, outer = case["rows"], case["inner"], case["outer"]
    x = normal(generator, dtype, rows, inner)
    weight = normal(generator, dtype, outer, inner, scale=inner**-0.5)
    norm = (1 + normal(generator, torch.float32, inner, scale=0.2)).to(dtype) if case.get("norm") else None
    residual = normal(generator, dtype, rows, outer) if case.get("residual") else None
    behind = {"gate": bool(case.get("gate")), "wide": bool(case.get("wide"))}
    return {"x": x, "weight": weight, "norm": norm, "residual": residual, **behind}


def _run(i: Inputs, backend: str | None) -> tuple[Tensor]:
    others = {"norm_K": i["norm"], "residual_XN": i["residual"], "eps": EPS, "gate": i["gate"], "wide": i["wide"]}
    return (linear(i["x"], i["weight"], **others, backend=backend),)


def _plain(i: Inputs) -> tuple[Tensor]:
    x = i["x"] if i["norm"] is None else F.rms_norm(i["x"], i["x"].shape[-1:], i["norm"], EPS)
    out = F.linear(x, i["weight"])
    if i["gate"]:
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
    if i["residual"] is not None:
        out = i["residual"] + out
    return (out.to(wide(out.dtype)) if i["wide"] else out,)


def _bytes(c: Case, size: int) -> int:
    outputs = c["rows"] * c["outer"]
    written = outputs * 4 if c.get("wide") else outputs // (2 if c.get("gate") else 1) * size
    read = c["rows"] * c["inner"] + c["inner"] * c["outer"]
    return (read + outputs * c.get("residual", 0) + c["inner"] * c.get("norm", 0)) * size + written


LINEAR = OpSpec(
    name="linear",
    cases=CASES,
    device_cases=DEVICE_CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=_run,
    narrow={"triton": kernel_dtypes(products=True)},
    plain=_plain,
    bytes=_bytes,
    flops=lambda c: 2 * c["rows"] * c["inner"] * c["outer"],
)
