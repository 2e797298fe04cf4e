"""The Triton kernel of linear: weights streamed once past a block of 64 rows, with one order over K for every row."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, aligned, architecture
from retinar.kernels.rows import as_rows, vector


@triton.jit(do_not_specialize=["rows", "inner", "outer", "x_stride"])
def _linear(
    x, weight, out, rows: tl.int64, inner: tl.int64, outer: tl.int64, x_stride: tl.int64,
    VEC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of x times COLUMNS rows of the weight, over all of K in steps of INNER.

    ``inner`` and ``x_stride`` come in units of VEC elements. Programs that share weights are neighbours, so that the
    weights come from memory once and from the L2 cache after that.
    """
    blocks = tl.cdiv(rows, ROWS).to(tl.int32)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) // blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    x_tile = x + row[:, None] * (x_stride * VEC) + k[None, :]
    weight_tile = weight + column[:, None] * (inner * VEC) + k[None, :]
    x_inside, weight_inside = (row < rows)[:, None], (column < outer)[:, None]
    width = inner.to(tl.int32) * VEC
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, INNER):
        left = (k < width - start)[None, :]
        a = tl.load(x_tile + start, mask=x_inside & left, other=0.0)
        b = tl.load(weight_tile + start, mask=weight_inside & left, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    places = out + row[:, None] * outer + column[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=x_inside & (column < outer)[None, :])


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


def tile_of(arch: int, dtype: torch.dtype, outer: int, vectors: bool) -> Tile:
    """One tile for any number of rows; stages as many as let two programs share a multiprocessor's memory.

    fp32, which is there for checks, is multiplied without tensor cores; K that is not a multiple of 16 bytes is read
    element by element, through registers.
    """
    columns = columns_of(outer)
    if dtype == torch.float32:
        return Tile(16, columns, 16, 4, 2)
    if not vectors:
        return Tile(64, columns, 32, 4, 1)
    if arch == 80:
        return Tile(64, columns, 64, 4, {64: 5, 32: 7, 16: 9}[columns])
    if outer <= NARROW:
        return Tile(64, columns, 128, 4, 11)
    return Tile(64, columns, 64, 4, {64: 7, 32: 9, 16: 11}[columns])


def variant_of(arch: int, dtype: torch.dtype, outer: int, inner: int) -> Variant:
    """The variant for a weight [outer, inner]; the rows of x do not come into it."""
    vectors = inner % vector(dtype) == 0
    tile = tile_of(arch, dtype, outer, vectors)
    constants = (
        ("VEC", vector(dtype) if vectors else 1),
        ("ROWS", tile.rows),
        ("COLUMNS", tile.columns),
        ("INNER", tile.inner),
    )
    return Variant(arch, (TYPES[dtype],) * 3, constants, tile.num_warps, tile.num_stages)


def _table(arch: int) -> Iterator[Variant]:
    outers = NARROW, NARROW + 1, *(columns * FEWEST for columns in COLUMNS[:-1])
    return (variant_of(arch, dtype, outer, inner) for dtype in FLOATS for outer in outers for inner in (1, 8))


LINEAR = Kernel("linear", _linear, _table)
KERNELS = (LINEAR,)


def linear(x_XK: Tensor, weight_NK: Tensor) -> Tensor:
    """[..., N] from [..., K] and [N, K]."""
    outer, inner = weight_NK.shape
    out_XN = x_XK.new_empty(*x_XK.shape[:-1], outer)
    if out_XN.numel() == 0:
        return out_XN
    variant = variant_of(architecture(x_XK.device) or 0, x_XK.dtype, outer, inner)
    constants = dict(variant.constants)
    unit = constants["VEC"]
    x_RK, weight_NK = as_rows(x_XK), aligned(weight_NK.contiguous())
    if x_RK.stride(0) % unit:
        x_RK = x_RK.contiguous()
    rows = x_RK.shape[0]
    grid = (triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(outer, constants["COLUMNS"]),)
    arguments = x_RK, weight_NK, out_XN, rows, inner // unit, outer, x_RK.stride(0) // unit
    LINEAR.launch(grid, arguments, constants, variant.num_warps, variant.num_stages)
    return out_XN
