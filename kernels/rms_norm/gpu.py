"""Triton kernels of rms_norm and add_rms_norm: rows that fit into registers here, others in long_rows.py.

A tile is [ROWS, PADDED, SPAN]: a row's SPAN columns lie across its warps, 16 bytes to a thread, and CHUNKS such spans
make the row. A tensor's sides are powers of two, but the mask ``chunk < CHUNKS`` is known to the compiler, which drops
what it excludes: width 1280 costs five vectors a thread, not the eight of a block of 2048. Where one warp holds a row,
its sums are shuffles alone, without shared memory or barriers.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import Kernel, aligned, architecture
from retinar.kernels.rms_norm import long_rows
from retinar.kernels.rms_norm.tiles import BACKWARD_TILES, FORWARD_TILES, Tile
from retinar.kernels.rms_norm.weight_gradient import MULTIPROCESSORS, SUM_PARTIALS, sum_partials
from retinar.kernels.rows import as_rows, whole_vectors


@triton.jit
def _columns(width, VEC: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, SPAN: tl.constexpr):
    """(columns, which of them exist), each [PADDED, SPAN]."""
    chunk = tl.arange(0, PADDED)[:, None]
    column = chunk * SPAN + tl.arange(0, SPAN)[None, :]
    return column, (chunk < CHUNKS) & (column < width.to(tl.int32) * VEC)


@triton.jit
def _row_sum(x):
    """[ROWS] from [ROWS, PADDED, SPAN]: first within each thread, then across the threads of the row."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def _row_sums(x, y, LANES: tl.constexpr, VEC: tl.constexpr):
    """The sums of two tensors at once: both are there before the one exchange between the row's LANES threads."""
    ROWS: tl.constexpr = x.shape[0]
    x = tl.sum(tl.reshape(tl.sum(x, 1), [ROWS, LANES, VEC]), 2)
    y = tl.sum(tl.reshape(tl.sum(y, 1), [ROWS, LANES, VEC]), 2)
    # In two steps, so that an interpreter that adds up one by one does not lose more digits than a GPU's tree.
    both = tl.reshape(tl.join(x, y), [ROWS, LANES // 8, 8, 2])
    return tl.split(tl.sum(tl.sum(both, 2), 1))


@triton.jit(do_not_specialize=["rows", "width", "x_stride", "more_stride"])
def _rms_norm_forward(
    x, more, weight, total, out, eps: tl.float32, rows: tl.int64, width: tl.int64, x_stride: tl.int64,
    more_stride: tl.int64, ADD: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One program: ROWS rows. With ADD, ``total`` = x + more is written and normalised. Width and strides in VECs."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    column, exists = _columns(width, VEC, CHUNKS, PADDED, SPAN)
    inside = exists[None] & (row < rows)
    values = tl.load(x + row * x_stride * VEC + column[None], mask=inside, other=0.0)
    if ADD:
        added = tl.load(more + row * more_stride * VEC + column[None], mask=inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * width * VEC + column[None], values, mask=inside)
    # Every row's threads read the weight themselves: it stays in L1, and arrives in the layout of x.
    w = tl.load(tl.broadcast_to(weight + column[None], [ROWS, PADDED, SPAN]), mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(_row_sum(wide * wide) / (width * VEC).to(tl.float32) + eps)
    normed = (wide * scale[:, None, None]).to(x.dtype.element_ty)  # rounded before the weight: LlamaGen's order
    y = normed.to(tl.float32) * w.to(tl.float32)
    tl.store(out + row * width * VEC + column[None], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width", "grad_stride", "x_stride", "more_stride"])
def _rms_norm_backward(
    grad, x, weight, more, grad_x, partial, eps: tl.float32, rows: tl.int64, width: tl.int64, grad_stride: tl.int64,
    x_stride: tl.int64, more_stride: tl.int64, ADD: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr,
    PADDED: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """One program: ROWS rows of every so many, and its share of the weight's gradient, one line of ``partial``.

    With ADD, ``more`` (the gradient of the residual) is added to that of x. Registers leave room for few warps, so the
    loop is pipelined through shared memory: rows arrive there while others are computed.
    """
    row_in_tile = tl.arange(0, ROWS).to(tl.int64)
    column, exists = _columns(width, VEC, CHUNKS, PADDED, SPAN)
    kept = (tl.arange(0, PADDED) < CHUNKS)[None, :, None]
    w = tl.load(tl.broadcast_to(weight + column[None], [ROWS, PADDED, SPAN]), mask=exists[None], other=0.0)
    share = tl.zeros([ROWS, PADDED, SPAN], tl.float32)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    for first in tl.range(tl.program_id(0).to(tl.int64) * ROWS, rows, step, num_stages=STAGES):
        row = (first + row_in_tile)[:, None, None]
        inside = exists[None] & (row < rows)
        wide = tl.load(x + row * x_stride * VEC + column[None], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * grad_stride * VEC + column[None], mask=inside, other=0.0).to(tl.float32)
        dn = dy * w.to(tl.float32)
        squares, products = _row_sums(wide * wide, dn * wide, SPAN // VEC, VEC)
        scale = tl.rsqrt(squares / (width * VEC).to(tl.float32) + eps)
        scale = tl.where(first + row_in_tile < rows, scale, 0.0)  # absent rows: with eps = 0 it would be infinite
        along = scale * products / (width * VEC).to(tl.float32)
        normed = wide * scale[:, None, None]
        dx = (dn - normed * along[:, None, None]) * scale[:, None, None]
        if ADD:
            dx += tl.load(more + row * more_stride * VEC + column[None], mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * width * VEC + column[None], dx.to(grad_x.dtype.element_ty), mask=inside)
        share = tl.where(kept, share + dy * normed, share)  # chunks that the compiler drops stay dropped
    tl.store(partial + tl.program_id(0).to(tl.int64) * width * VEC + column, tl.sum(share, 0), mask=exists)


FORWARD = Kernel("rms_norm", _rms_norm_forward, FORWARD_TILES.table)
BACKWARD = Kernel("rms_norm", _rms_norm_backward, BACKWARD_TILES.table)
KERNELS = (FORWARD, BACKWARD, SUM_PARTIALS, long_rows.FORWARD, long_rows.SUMS, long_rows.BACKWARD)


def _as_rows(tile: Tile | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as rows; for a tile each row must begin at a multiple of 16 bytes, or all are copied."""
    rows = [as_rows(each) for each in tensors]
    fits = tile is None or whole_vectors(*(each.stride(0) for each in rows), dtype=rows[0].dtype)
    return rows if fits else [each.contiguous() for each in rows]


def _weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return aligned(weight.to(dtype).contiguous())


def _forward(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, total) in the shape of x; without ``more``, total is normed again."""
    add, out = more is not None, x.new_empty(x.shape)
    total = x.new_empty(x.shape) if add else out
    if x.numel() == 0:
        return out, total
    tile = FORWARD_TILES.choose(x.shape[-1], x.dtype)
    inputs = _as_rows(tile, x) * 2 if more is None else _as_rows(tile, x, more)
    rows, width = inputs[0].shape
    tensors = (*inputs, _weight(weight, x.dtype), total, out)
    strides = [each.stride(0) for each in inputs]
    if tile is None:
        long_rows.forward(tensors, eps, rows, width, strides, add)
    else:
        variant = FORWARD_TILES.variant(x.dtype, tile, add, architecture(x.device) or 0)
        constants = dict(variant.constants)
        units = [each // constants["VEC"] for each in (width, *strides)]
        grid = (triton.cdiv(rows, constants["ROWS"]),)
        FORWARD.launch(grid, (*tensors, eps, rows, *units), constants, variant.num_warps)
    return out, total


def _backward(grad: Tensor, x: Tensor, weight: Tensor, more: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x, plus ``more``, and of the weight."""
    grad_x = x.new_empty(x.shape)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight)
    add, arch = more is not None, architecture(x.device) or 0
    tile = BACKWARD_TILES.choose(x.shape[-1], x.dtype)
    dy, flat, *others = _as_rows(tile, grad, x) if more is None else _as_rows(tile, grad, x, more)
    added = others[0] if others else flat
    rows, width = flat.shape
    tensors = dy, flat, _weight(weight, x.dtype), added, grad_x
    strides = [each.stride(0) for each in (dy, flat, added)]
    if tile is None:
        partial = long_rows.backward(tensors, eps, rows, width, strides, add)
    else:
        variant = BACKWARD_TILES.variant(x.dtype, tile, add, arch)
        constants = dict(variant.constants)
        programs = min(triton.cdiv(rows, constants["ROWS"]), tile.resident[add] * MULTIPROCESSORS[arch])
        partial = x.new_empty((programs, width), dtype=torch.float32)
        units = [each // constants["VEC"] for each in (width, *strides)]
        BACKWARD.launch((programs,), (*tensors, partial, eps, rows, *units), constants, variant.num_warps)
    return grad_x, sum_partials(partial, weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of x [..., D]."""
    return _forward(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum)."""
    return _forward(x, residual, weight, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    return _backward(grad, x, weight, None, eps)


def add_rms_norm_backward(
    grad: Tensor, grad_residual: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the residual before it: the same) and weight, from the sum that the forward returned."""
    return _backward(grad, residual, weight, grad_residual, eps)
