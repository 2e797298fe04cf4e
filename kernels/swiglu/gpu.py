"""Triton kernels of swiglu. Bytes are all that counts: 2 F read and F written forward, 3 F and 2 F backward."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, architecture
from retinar.kernels.rows import as_rows, vector, whole_vectors

# The tile of a program. Hidden sizes are multiples of 256, so steps of 512 columns leave at most half a tile idle. A
# thread has one vector of every input: with more, the compiler asks for the second only after it has used the first.
BLOCK, WARPS = 512, 8


@triton.jit
def _tile(width, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows [ROWS, 1], first column, how many columns) of a program; neighbouring programs lie along the columns."""
    blocks = tl.cdiv(width, BLOCK // VEC).to(tl.int32)  # programs are counted in 32 bits: so is their quotient
    block = (tl.program_id(0) % blocks).to(tl.int64)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.minimum(width - block * (BLOCK // VEC), BLOCK // VEC).to(tl.int32) * VEC
    return row[:, None], block * BLOCK, columns


@triton.jit
def _quotient(x, y, ROUNDED: tl.constexpr):
    """x / y; the plain quotient of fp32 is off by up to 2 ulp, which only fp32 results would show."""
    return tl.div_rn(x, y) if ROUNDED else x / y


@triton.jit(do_not_specialize=["rows", "width", "gate_stride", "up_stride", "up_offset"])
def _swiglu_forward(
    gate, up, out, rows: tl.int64, width: tl.int64, gate_stride: tl.int64, up_stride: tl.int64, up_offset: tl.int64,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Width, strides and offset come in units of VEC elements; ``up`` begins ``up_offset`` behind its pointer."""
    row, first, columns = _tile(width, VEC, ROWS, BLOCK)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    g = tl.load(gate + (row * gate_stride * VEC + first) + column, mask=inside).to(tl.float32)
    u = tl.load(up + (row * up_stride * VEC + up_offset * VEC + first) + column, mask=inside).to(tl.float32)
    y = _quotient(g, 1 + tl.exp(-g), out.dtype.element_ty == tl.float32) * u
    tl.store(out + (row * width * VEC + first) + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width", "grad_stride", "gate_stride", "up_stride", "up_offset", "out_stride"])
def _swiglu_backward(
    grad, gate, up, grad_gate, grad_up, rows: tl.int64, width: tl.int64, grad_stride: tl.int64, gate_stride: tl.int64,
    up_stride: tl.int64, up_offset: tl.int64, out_stride: tl.int64,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The same tiling. ``out_stride`` and ``up_offset`` are those of both gradients too."""
    row, first, columns = _tile(width, VEC, ROWS, BLOCK)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    dy = tl.load(grad + (row * grad_stride * VEC + first) + column, mask=inside).to(tl.float32)
    g = tl.load(gate + (row * gate_stride * VEC + first) + column, mask=inside).to(tl.float32)
    u = tl.load(up + (row * up_stride * VEC + up_offset * VEC + first) + column, mask=inside).to(tl.float32)
    s = _quotient(1.0, 1 + tl.exp(-g), grad_gate.dtype.element_ty == tl.float32)
    dg = dy * u * s * (1 + g * (1 - s))
    du = dy * g * s
    out = row * out_stride * VEC + first
    tl.store(grad_gate + out + column, dg.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + (out + up_offset * VEC) + column, du.to(grad_up.dtype.element_ty), mask=inside)


def choose(pointers: int, dtype: torch.dtype, vectors: bool, architecture: int) -> Variant:
    """The variant of a kernel with so many pointers; ``vectors``: all rows consist of aligned whole vectors."""
    rows = WARPS * 32 * vector(dtype) // BLOCK
    constants = (("VEC", vector(dtype) if vectors else 1), ("ROWS", rows), ("BLOCK", BLOCK))
    return Variant(architecture, (TYPES[dtype],) * pointers, constants, WARPS)


def _table(pointers: int) -> Callable[[int], Iterator[Variant]]:
    return lambda architecture: (choose(pointers, dtype, v, architecture) for dtype in FLOATS for v in (False, True))


FORWARD = Kernel("swiglu", _swiglu_forward, _table(3))
BACKWARD = Kernel("swiglu", _swiglu_backward, _table(5))
KERNELS = (FORWARD, BACKWARD)


def _launch(kernel: Kernel, tensors: tuple[Tensor, ...], rows: int, width: int, *strides: int) -> None:
    """One program a tile; width and strides in elements."""
    dtype, device = tensors[0].dtype, tensors[0].device
    variant = choose(len(tensors), dtype, whole_vectors(width, *strides, dtype=dtype), architecture(device) or 0)
    constants = dict(variant.constants)
    units = [each // constants["VEC"] for each in (width, *strides)]
    grid = (triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(width, BLOCK),)
    kernel.launch(grid, (*tensors, rows, *units), constants, variant.num_warps)


def _forward(gate: Tensor, up: Tensor, out: Tensor, up_offset: int) -> Tensor:
    if out.numel():
        gate, up = as_rows(gate), as_rows(up)
        width = out.shape[-1]
        _launch(FORWARD, (gate, up, out), gate.shape[0], width, gate.stride(0), up.stride(0), up_offset)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """[..., F] from gate and up [..., F]."""
    return _forward(gate, up, gate.new_empty(gate.shape), 0)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """[..., F] from [gate | up] [..., 2F]. Both halves are read behind one pointer, which is aligned for any F."""
    width = gate_up.shape[-1] // 2
    return _forward(gate_up, gate_up, gate_up.new_empty(*gate_up.shape[:-1], width), width)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, each [..., F] and contiguous."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad.numel():
        grad, gate, up = as_rows(grad), as_rows(gate), as_rows(up)
        rows, width = grad.shape
        strides = grad.stride(0), gate.stride(0), up.stride(0), 0, width
        _launch(BACKWARD, (grad, gate, up, grad_gate, grad_up), rows, width, *strides)
    return grad_gate, grad_up


def swiglu_packed_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of [gate | up], [..., 2F] and contiguous."""
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    if grad.numel():
        grad, gate_up = as_rows(grad), as_rows(gate_up)
        rows, width = grad.shape
        strides = grad.stride(0), gate_up.stride(0), gate_up.stride(0), width, 2 * width
        _launch(BACKWARD, (grad, gate_up, gate_up, grad_gate_up, grad_gate_up), rows, width, *strides)
    return grad_gate_up
