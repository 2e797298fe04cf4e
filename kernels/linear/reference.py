"""x W^T in blocks of a fixed number of rows, so that the bits of a row do not depend on how many rows there are.

BLAS picks its kernel, and with it the order of the sum over K, from the number of rows: torch's CPU linear gives
other bits for 2 rows than for 6. One shape always gets one kernel. 32 rows is where a block of a small transformer
stops being bound by reading the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.numerics import widen
from retinar.kernels.rms_norm.reference import rms_norm
from retinar.kernels.swiglu.reference import swiglu

BLOCK_ROWS = 32


def linear(
    x_XK: Tensor,
    weight_NK: Tensor,
    norm_K: Tensor | None,
    residual_XN: Tensor | None,
    eps: float,
    gate: bool,
    wide: bool,
) -> Tensor:
    """The norm in front, the product, and what follows it, each rounded to x's dtype."""
    out_XN = product(x_XK if norm_K is None else rms_norm(x_XK, norm_K, eps), weight_NK)
    if gate:
        return swiglu(*out_XN.chunk(2, -1))
    if residual_XN is not None:
        return residual_XN + out_XN
    return widen(out_XN) if wide else out_XN


def product(x_XK: Tensor, weight_NK: Tensor) -> Tensor:
    weight_KN = weight_NK.contiguous().t()
    rows_RK = x_XK.reshape(-1, x_XK.shape[-1])
    count, width = rows_RK.shape
    blocks = -(-count // BLOCK_ROWS)
    # Always a copy: a block that starts at an odd address may take another path through BLAS.
    padded_RK = x_XK.new_zeros(blocks * BLOCK_ROWS, width)
    padded_RK[:count] = rows_RK
    out_RN = x_XK.new_empty(blocks * BLOCK_ROWS, weight_NK.shape[0])
    for block_BK, out_BN in zip(padded_RK.split(BLOCK_ROWS), out_RN.split(BLOCK_ROWS), strict=True):
        torch.mm(block_BK, weight_KN, out=out_BN)
    return out_RN[:count].view(*x_XK.shape[:-1], weight_NK.shape[0])
