"""How row-wise kernels see a tensor: as [rows, width], each row in one piece, read by 16 bytes where they fit."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.launch import aligned

#: The widest access of a thread to memory.
VECTOR_BYTES = 16


def as_rows(x: Tensor) -> Tensor:
    """[rows, width], aligned, with neighbouring elements in a row: a view where the strides allow it, else a copy.

    The row stride is any number, 0 and beyond 2^31 included; that of a single row is 0.
    """
    if x.dim() == 1:
        x = x[None]
    # A copy is needed for gaps inside rows, and for leading dimensions that no single stride walks through.
    x = x.flatten(0, -2) if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous().flatten(0, -2)
    x = aligned(x)
    return x if x.shape[0] > 1 else x.as_strided(x.shape, (0, 1))


def vector(dtype: torch.dtype) -> int:
    """Elements of one 16-byte access."""
    return VECTOR_BYTES // dtype.itemsize


def whole_vectors(width: int, *strides: int, dtype: torch.dtype) -> bool:
    """Whether every row consists of whole vectors and starts at a multiple of 16 bytes."""
    return all(each % vector(dtype) == 0 for each in (width, *strides))
