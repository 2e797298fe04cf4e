"""Liger's Triton kernels, where the package liger-kernel is installed.

Its SwiGLU backward writes the gradients over gate and up. A kept graph then runs on ever other numbers, at the same
speed, and the inputs are spoilt: Liger comes last among the baselines of an op.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from retinar.bench.baselines.table import Baseline, Run
from retinar.kernels.spec import Inputs, OpSpec

EPS = 1e-5  # of ops.rms_norm
# In place, Liger would overwrite the gradient that a kept graph is given again and again.
_NORM = (EPS, 0.0, "llama", False)


def _functions(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _make(spec: OpSpec, device: str, size: str) -> Run:
    if spec.name == "rms_norm":
        norm = _functions("rms_norm", "LigerRMSNormFunction")
        return lambda i: (norm.apply(i["x"], i["weight"], *_NORM),)
    if spec.name == "add_rms_norm":
        add_norm = _functions("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        return lambda i: add_norm.apply(i["x"], i["residual"], i["weight"], *_NORM)
    if spec.name == "swiglu":
        gate = _functions("swiglu", "LigerSiLUMulFunction")
        return lambda i: (gate.apply(i["gate"], i["up"]),)
    loss = _functions("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")

    def run(i: Inputs) -> tuple[Tensor]:
        found = loss.apply(i["hidden"], i["weight"], i["targets"])
        return (found[0] if isinstance(found, tuple) else found,)

    return run


def _absent(device: str, size: str) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if device == "cuda" else "liger-kernel needs a CUDA device"


BASELINES = (Baseline("Liger", ("rms_norm", "add_rms_norm", "swiglu", "linear_cross_entropy"), _absent, _make),)
