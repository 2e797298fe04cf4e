"""`linear` by torch's own products, cuBLAS on a GPU, for steps of many rows.

From some hundreds of rows a product is bound by arithmetic, and a library's is faster than one made to stream weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.rms_norm.gpu import rms_norm
from retinar.kernels.swiglu.gpu import swiglu_packed


def linear(
    x_BK: Tensor,
    weight_NK: Tensor,
    norm_K: Tensor | None,
    residual_BN: Tensor | None,
    eps: float,
    gate: bool,
    wide: bool,
) -> Tensor:
    """[B, N], with ``gate`` [B, N / 2]. The bits of a row may depend on the number of rows. A residual is written over:
    the product adds itself to it, without a launch and a rounding of its own.

    fp32 is multiplied as torch is told (``torch.backends.cuda.matmul``), by default without TF32.
    """
    if norm_K is not None:
        x_BK = rms_norm(x_BK, norm_K, eps)
    if residual_BN is not None:
        return residual_BN.addmm_(x_BK, weight_NK.t())
    out_BN = torch.mm(x_BK, weight_NK.t())
    if gate:
        return swiglu_packed(out_BN)
    return out_BN.float() if wide else out_BN
