"""The Triton kernel of linear: weights streamed once past a block of 64 rows, with one order over K for every row.

What stands around the product goes along: an RMSNorm in front, and behind it the gate, the residual or fp32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, aligned, architecture
from retinar.kernels.numerics import wide as wide_dtype
from retinar.kernels.rms_norm.gpu import rms_norm
from retinar.kernels.rows import as_rows, vector


@triton.jit(do_not_specialize=["rows", "inner", "outer", "x_stride", "residual_stride"])
def _linear(
    x, weight, norm, residual, out, eps: tl.float32, rows: tl.int64, inner: tl.int64, outer: tl.int64,
    x_stride: tl.int64, residual_stride: tl.int64, NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of x times COLUMNS rows of the weight, over all of K in steps of INNER.

    ``outer`` counts the result's columns; with GATE, half of a program's weight rows are gates and half the same
    columns' ups. ``inner`` and ``x_stride`` come in units of VEC elements. Programs that share weights are neighbours,
    so that the weights come from memory once and from the L2 cache after that.
    """
    WIDTH: tl.constexpr = COLUMNS // 2 if GATE else COLUMNS
    blocks = tl.cdiv(rows, ROWS).to(tl.int32)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * WIDTH
    column = first + tl.arange(0, COLUMNS) % WIDTH
    half = tl.arange(0, COLUMNS) // WIDTH  # 1: an up
    k = tl.arange(0, INNER)
    x_tile = x + row[:, None] * (x_stride * VEC) + k[None, :]
    weight_tile = weight + (column + half * outer)[:, None] * (inner * VEC) + k[None, :]
    x_inside, weight_inside = (row < rows)[:, None], (column < outer)[:, None]
    place = first + tl.arange(0, WIDTH)[None, :]
    inside = x_inside & (place < outer)
    if ADD:  # asked for before the weights, so that it is there when they are through
        added = tl.load(residual + row[:, None] * residual_stride + place, mask=inside, other=0.0)
    width = inner.to(tl.int32) * VEC
    tl.assume(width > 0)  # a path around the loop makes the assembler serialise products or spill
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, INNER // VEC), tl.float32)  # a thread's own vectors: no exchange inside the loop
    for start in range(0, width, INNER):
        left = (k < width - start)[None, :]
        a = tl.load(x_tile + start, mask=x_inside & left, other=0.0)
        b = tl.load(weight_tile + start, mask=weight_inside & left, other=0.0)
        if NORM:  # the row's scale waits until the end: it is common to all of K
            n = tl.load(norm + start + k[None, :], mask=left, other=0.0)
            wide = a.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, [ROWS, INNER // VEC, VEC]), 2)
            a = (wide * n.to(tl.float32)).to(a.dtype)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    if NORM:
        total *= tl.rsqrt(tl.sum(squares, 1) / width.to(tl.float32) + eps)[:, None]
    if GATE:
        gate, up = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, WIDTH]), [0, 2, 1]))
        total = gate / (1 + tl.exp(-gate)) * up
    if ADD:
        total += added.to(tl.float32)
    tl.store(out + row[:, None] * outer + place, total.to(out.dtype.element_ty), mask=inside)


class Form(NamedTuple):
    """What goes along with a product: ``norm`` in front, at most one of the others behind."""

    norm: bool = False
    gate: bool = False
    residual: bool = False
    wide: bool = False


#: All but a norm and a residual at once, which no model of ours has: there the norm is a launch of its own.
FORMS = (
    *(
        Form(norm, gate, wide=wide)
        for norm in (False, True)
        for gate, wide in ((False, False), (True, False), (False, True))
    ),
    Form(residual=True),
)


class Tile(NamedTuple):
    """Rows of x, rows of the weight, step over K, warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


#: Rows of the weight in a program: the first that leaves work for an A100's 108 multiprocessors (an H200 has 132).
COLUMNS = (64, 32, 16)
FEWEST = 108
#: Up to here the programs of 16 are no more than an H200's multiprocessors, and one may have all of its shared memory.
NARROW = 16 * 132


def columns_of(outer: int) -> int:
    """Rows of the weight in a program, from their number alone: never from the rows of x."""
    return next((each for each in COLUMNS if outer >= each * FEWEST), COLUMNS[-1])


def tile_of(arch: int, dtype: torch.dtype, outer: int, norm: bool) -> Tile:
    """One tile for any number of rows; stages as many as let two programs share a multiprocessor's memory.

    fp32, which is there for checks, is multiplied without tensor cores.
    """
    columns = columns_of(outer)
    if dtype == torch.float32:
        return Tile(16, 32, 16, 4, 2)
    if arch == 80:
        return Tile(64, columns, 64, 4, {64: 5, 32: 7, 16: 9}[columns])
    if (
        outer <= NARROW
    ):  # 128 threads copy a norm of 64 by 16 bytes each, one of 128 by 2: too little to be asynchronous
        return Tile(64, columns, 64, 4, 21) if norm else Tile(64, columns, 128, 4, 11)
    return Tile(64, columns, 64, 4, {64: 7, 32: 9, 16: 11}[columns])


def takes_norm(dtype: torch.dtype, inner: int) -> bool:
    """Whether a norm can go along with the product. fp16 cannot hold x times the norm's weight for every x: it needs
    the row's scale first. K that is not a multiple of 16 bytes is padded, and a mean would count the padding."""
    return dtype != torch.float16 and inner > 0 and inner % vector(dtype) == 0


def variant_of(arch: int, dtype: torch.dtype, outer: int, form: Form) -> Variant:
    """The variant for a weight of ``outer`` rows; neither K nor the rows of x come into it."""
    tile = tile_of(arch, dtype, outer, form.norm)
    constants = (
        ("NORM", form.norm),
        ("GATE", form.gate),
        ("ADD", form.residual),
        ("VEC", vector(dtype)),
        ("ROWS", tile.rows),
        ("COLUMNS", tile.columns),
        ("INNER", tile.inner),
    )
    result = wide_dtype(dtype) if form.wide else dtype
    return Variant(arch, (TYPES[dtype],) * 4 + (TYPES[result],), constants, tile.num_warps, tile.num_stages)


def _table(arch: int) -> Iterator[Variant]:
    outers = NARROW, NARROW + 1, *(columns * FEWEST for columns in COLUMNS[:-1])
    for dtype in FLOATS:
        for form in FORMS:
            if not form.norm or takes_norm(dtype, vector(dtype)):
                yield from (variant_of(arch, dtype, outer, form) for outer in outers)


LINEAR = Kernel("linear", _linear, _table)
KERNELS = (LINEAR,)


def _whole_vectors(x: Tensor) -> Tensor:
    """The matrix with zeros behind its rows up to whole vectors, one at least: products see nothing of it."""
    width, unit = x.shape[-1], vector(x.dtype)
    behind = -width % unit if width else unit
    return F.pad(x, (0, behind)) if behind else x


def linear(
    x_XK: Tensor,
    weight_NK: Tensor,
    norm_K: Tensor | None,
    residual_XN: Tensor | None,
    eps: float,
    gate: bool,
    wide: bool,
) -> Tensor:
    """[..., N] from [..., K] and [N, K], with ``gate`` [..., N / 2]; in fp32 with ``wide``."""
    weights, inner = weight_NK.shape
    outer, result = weights // (2 if gate else 1), wide_dtype(x_XK.dtype) if wide else x_XK.dtype
    out_XN = x_XK.new_empty(*x_XK.shape[:-1], outer, dtype=result)
    if out_XN.numel() == 0:
        return out_XN
    if norm_K is not None and (residual_XN is not None or not takes_norm(x_XK.dtype, inner)):
        x_XK, norm_K = rms_norm(x_XK, norm_K, eps), None
    form = Form(norm_K is not None, gate, residual_XN is not None, wide)
    variant = variant_of(architecture(x_XK.device) or 0, x_XK.dtype, weights, form)
    constants, unit = dict(variant.constants), vector(x_XK.dtype)
    x_RK, weight_NK = _whole_vectors(as_rows(x_XK)), aligned(_whole_vectors(weight_NK.contiguous()))
    if x_RK.stride(0) % unit:
        x_RK = x_RK.contiguous()
    norm_K = weight_NK if norm_K is None else aligned(norm_K.contiguous())
    residual_RN = x_RK if residual_XN is None else as_rows(residual_XN)
    rows, width = x_RK.shape
    grid = (triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(weights, constants["COLUMNS"]),)
    strides = x_RK.stride(0) // unit, residual_RN.stride(0)
    arguments = x_RK, weight_NK, norm_K, residual_RN, out_XN, eps, rows, width // unit, outer, *strides
    LINEAR.launch(grid, arguments, constants, variant.num_warps, variant.num_stages)
    return out_XN
