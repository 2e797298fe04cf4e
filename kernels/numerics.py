"""Numerical ground rules that the references share: the accumulation type, fixed shapes, bits without neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Elements of one SIMD step of torch's CPU loops, at most: 2 vectors of 32 bf16 in AVX-512.
LANES = 64


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: fp32, or fp64 for fp64 inputs (which tests use as truth)."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """The input in the type to compute in and contiguous, so that sums run in one order whatever the strides."""
    return x.to(wide(x.dtype)).contiguous()


def lanewise(function: Callable[[Tensor], Tensor], x: Tensor, grain: int = 32768) -> Tensor:
    """Applies a transcendental elementwise function so that an element's bits do not depend on its place.

    torch's CPU loops evaluate exp, log and their like with SIMD polynomials in the body of a thread's share and with
    libm in its tail, and the two differ in the last bit. Here the flattened tensor is padded so that every thread's
    share is a whole number of SIMD steps, and the tail does not exist. (Products, sums, quotients and square roots
    are correctly rounded either way and need no such care.)

    Args:
        function: elementwise, shape preserving.
        x: any shape, any floating dtype.
        grain: elements below which torch runs ``function`` on one thread (32768; 2048 for the vector-math functions
            such as log and log1p).
    """
    count, threads = x.numel(), torch.get_num_threads()
    if count <= grain:
        padded = -(-count // LANES) * LANES
    else:
        step = LANES * threads
        padded = max(-(-count // step) * step, -(-grain // LANES) * step)
    if x.device.type != "cpu" or (padded == count and x.is_contiguous()):
        return function(x)
    flat = x.new_zeros(padded)
    flat[:count] = x.reshape(-1)
    return function(flat)[:count].view(x.shape)
