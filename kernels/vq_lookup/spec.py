"""Spec of vq_lookup."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.vq_lookup import vq_lookup

CASES = (
    {"vectors": 1, "codes": 1, "channels": 1},
    {"vectors": 7, "codes": 101, "channels": 5},
    {"vectors": 70, "codes": 2003, "channels": 8},
    {"vectors": 33, "codes": 130, "channels": 20},
)


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {
        "z": normal(generator, dtype, case["vectors"], case["channels"]),
        "codebook": normal(generator, dtype, case["codes"], case["channels"]),
    }


def _plain(i: Inputs) -> tuple[Tensor, Tensor]:
    # The choice in fp32, as in the definition: a code chosen in bf16 would be another code. Straight-through after it.
    z, codebook = F.normalize(i["z"].float(), dim=-1), F.normalize(i["codebook"].float(), dim=-1)
    codes = torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    z = F.normalize(i["z"], dim=-1)
    return codes, z + (codebook[codes] - z).detach()


VQ_LOOKUP = OpSpec(
    name="vq_lookup",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=lambda i, backend: vq_lookup(i["z"], i["codebook"], backend=backend),
    plain=_plain,
    gradients=("z",),
    narrow={"triton": kernel_dtypes()},
    bytes=lambda c, size: (c["vectors"] + c["codes"]) * c["channels"] * size + c["vectors"] * (8 + 4 * c["channels"]),
    flops=lambda c: 2 * c["vectors"] * c["codes"] * c["channels"],
    backward_bytes=lambda c, size: c["vectors"] * c["channels"] * (4 + 2 * size),
    backward_flops=lambda c: 8 * c["vectors"] * c["channels"],
)
