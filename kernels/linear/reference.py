"""x W^T in blocks of a fixed number of rows, so that the bits of a row do not depend on how many rows there are.

BLAS picks its kernel, and with it the order of the sum over K, from the number of rows: torch's CPU linear gives
other bits for 2 rows than for 6. One shape always gets one kernel. 32 rows is where a block of a small transformer
stops being bound by reading the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 32


def linear(x_XK: Tensor, weight_NK: Tensor) -> Tensor:
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
