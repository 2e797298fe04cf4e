"""Triton kernels for the rows that gpu.py does not take: too long for registers, or not made of aligned whole vectors.

Rows are read in blocks, twice: once for their sums, once for the results, out of the cache where they fit there. One
element to an access, so any width and stride will do. ``add`` is an argument, not a constant: these are the slow ones.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, architecture
from retinar.kernels.rms_norm.weight_gradient import MULTIPROCESSORS

BLOCK, WARPS = 1024, 4
RESIDENT = 4  # programs to a multiprocessor, of those that walk down the columns


@triton.jit
def _sum_block(x, more, row, columns, inside, add, x_stride, more_stride):
    """x, or x + more rounded to its type, in that type."""
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    added = tl.load(more + row * more_stride + columns, mask=inside & (add != 0), other=0.0)
    return tl.where(add != 0, (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype), values)


@triton.jit(do_not_specialize=["width", "x_stride", "more_stride", "add"])
def _long_norm_forward(
    x, more, weight, total, out, eps: tl.float32, width: tl.int64, x_stride: tl.int64, more_stride: tl.int64,
    add: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: a row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        wide = _sum_block(x, more, row, columns, columns < width, add, x_stride, more_stride).to(tl.float32)
        squares += wide * wide
    scale = tl.rsqrt(tl.sum(squares, 0) / width.to(tl.float32) + eps)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        values = _sum_block(x, more, row, columns, inside, add, x_stride, more_stride)
        tl.store(total + row * width + columns, values, mask=inside & (add != 0))
        normed = (values.to(tl.float32) * scale).to(values.dtype)  # rounded before the weight: LlamaGen's order
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + columns, (normed.to(tl.float32) * w).to(values.dtype), mask=inside)


@triton.jit(do_not_specialize=["rows", "width", "grad_stride", "x_stride"])
def _long_norm_sums(
    grad, x, weight, sums, eps: tl.float32, rows: tl.int64, width: tl.int64, grad_stride: tl.int64,
    x_stride: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: a row's scale and, behind all the scales, its mean of (gradient of n) * n."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        squares += wide * wide
        products += dy * w * wide
    scale = tl.rsqrt(tl.sum(squares, 0) / width.to(tl.float32) + eps)
    tl.store(sums + row, scale)
    tl.store(sums + rows + row, scale * tl.sum(products, 0) / width.to(tl.float32))


@triton.jit(do_not_specialize=["rows", "width", "grad_stride", "x_stride", "more_stride", "add"])
def _long_norm_backward(
    grad, x, weight, more, sums, grad_x, partial, rows: tl.int64, width: tl.int64, grad_stride: tl.int64,
    x_stride: tl.int64, more_stride: tl.int64, add: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK columns of every so many rows, and their share of the weight's gradient."""
    blocks = tl.cdiv(width, BLOCK).to(tl.int32)
    programs = (tl.num_programs(0) // blocks).to(tl.int64)
    program = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, programs):
        row += tl.zeros([], tl.int64)  # the interpreter's loops count in Python's numbers
        scale, along = tl.load(sums + row), tl.load(sums + rows + row)
        normed = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * scale
        dy = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(more + row * more_stride + columns, mask=inside & (add != 0), other=0.0).to(tl.float32)
        dx = (dy * w - normed * along) * scale + added
        tl.store(grad_x + row * width + columns, dx.to(grad_x.dtype.element_ty), mask=inside)
        share += dy * normed
    tl.store(partial + program * width + columns, share, mask=inside)


def _table(kind: str) -> Callable[[int], Iterator[Variant]]:
    """One variant a dtype. ``kind``: the pointers, "x" of the dtype and "f" of fp32."""

    def table(architecture: int) -> Iterator[Variant]:
        for dtype in FLOATS:
            pointers = tuple(TYPES[dtype] if each == "x" else "fp32" for each in kind)
            yield Variant(architecture, pointers, (("BLOCK", BLOCK),), WARPS)

    return table


FORWARD = Kernel("rms_norm", _long_norm_forward, _table("xxxxx"))
SUMS = Kernel("rms_norm", _long_norm_sums, _table("xxxf"))
BACKWARD = Kernel("rms_norm", _long_norm_backward, _table("xxxxfxf"))


def forward(tensors: tuple[Tensor, ...], eps: float, rows: int, width: int, strides: list[int], add: bool) -> None:
    """Fills the last two of ``tensors`` = (x, more, weight, total, out); ``strides`` are those of the first two."""
    FORWARD.launch((rows,), (*tensors, eps, width, *strides, int(add)), {"BLOCK": BLOCK}, WARPS)


def backward(tensors: tuple[Tensor, ...], eps: float, rows: int, width: int, strides: list[int], add: bool) -> Tensor:
    """Fills the last of ``tensors`` = (grad, x, weight, more, grad_x); returns the partial sums of the weight's
    gradient. ``strides`` are those of grad, x and more."""
    grad, x, weight, more, grad_x = tensors
    programs = min(rows, RESIDENT * MULTIPROCESSORS[architecture(x.device) or 0])
    sums, partial = (x.new_empty(size, dtype=torch.float32) for size in ((2, rows), (programs, width)))
    SUMS.launch((rows,), (grad, x, weight, sums, eps, rows, width, *strides[:2]), {"BLOCK": BLOCK}, WARPS)
    grid = (programs * triton.cdiv(width, BLOCK),)
    arguments = grad, x, weight, more, sums, grad_x, partial, rows, width, *strides, int(add)
    BACKWARD.launch(grid, arguments, {"BLOCK": BLOCK}, WARPS)
    return partial
