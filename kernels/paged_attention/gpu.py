"""Launchers of paged_attention's Triton kernels (`split.py`), and the tables of what they launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, aligned, architecture
from retinar.kernels.paged_attention.split import (
    _paged_attention_combine,
    _paged_attention_groups,
    _paged_attention_heads,
)

#: Slots of a split. Fixed, so that a row's sums are cut at the same slots whatever its neighbours; README.md counts it.
SPLIT = 128
#: Splits that the second kernel reads at once: all of a sequence of 1,024.
SPLITS = 8
#: Query heads of a program where several share a key-value head: the rows of a tensor core's smallest tile.
QUERIES = 16


class Shape(NamedTuple):
    """What the kernels are specialised to: the padded half of the head dim, and whether padding is none."""

    half: int
    exact: bool

    @property
    def vector(self) -> int:
        """Elements that the caches' strides are multiples of: 8 where the head dim allows it, else 4 (100, 20)."""
        return 8 if self.exact else 4


SHAPES = (Shape(16, True), Shape(32, True), Shape(64, True), Shape(64, False))


class Tile(NamedTuple):
    """Slots of one iteration over a split, and warps."""

    block: int
    num_warps: int


def shape_of(head_dim: int) -> Shape:
    """Head dims 32, 64 and 128 as they are; the others, 100 among them, padded to 128 in registers."""
    exact = Shape(head_dim // 2, True)
    return exact if exact in SHAPES else SHAPES[-1]


def heads_warps(dtype: torch.dtype, shape: Shape) -> int:
    """Warps of the kernel for heads with keys of their own, which has a whole split in registers: 128 bytes of keys and
    as many of values a thread, or twice that in fp32 with head dims above 64."""
    return 8 if 2 * shape.half * dtype.itemsize > 128 else 4


def groups_tile(dtype: torch.dtype, shape: Shape) -> Tile:
    """Tile of the kernel for heads that share theirs; fp32 is multiplied without tensor cores, out of registers."""
    if dtype == torch.float32:
        return Tile(16, 8 if shape.half == 64 else 4)
    return Tile(SPLIT, 8 if shape.half == 64 else 4)


def splits_of(columns: int, page_slots: int) -> int:
    """Splits of the longest row that a block table of so many columns can hold."""
    return -(-columns * page_slots // SPLIT)


def _constants(shape: Shape, **others: int) -> dict[str, int | bool]:
    return {"VEC": shape.vector, "HALF": shape.half, "EXACT": shape.exact, **others}


def heads_variant(arch: int, dtype: torch.dtype, shape: Shape) -> Variant:
    constants = _constants(shape, SPLIT=SPLIT)
    return Variant(arch, _types(dtype), tuple(constants.items()), heads_warps(dtype, shape))


def groups_variant(arch: int, dtype: torch.dtype, shape: Shape) -> Variant:
    tile = groups_tile(dtype, shape)
    constants = _constants(shape, QUERIES=QUERIES, SPLIT=SPLIT, BLOCK=tile.block)
    return Variant(arch, _types(dtype), tuple(constants.items()), tile.num_warps)


def combine_variant(arch: int, dtype: torch.dtype, shape: Shape) -> Variant:
    pointers = ("fp32", "fp32", "fp32", "i32", TYPES[dtype])
    return Variant(arch, pointers, tuple(_constants(shape, SPLIT=SPLIT, SPLITS=SPLITS).items()), 1)


def _types(dtype: torch.dtype) -> tuple[str, ...]:
    return (TYPES[dtype],) * 5 + ("i32", "i32", "fp32", "fp32", "fp32", "fp32")


def _heads_table(arch: int) -> Iterator[Variant]:
    return (heads_variant(arch, dtype, shape) for dtype in FLOATS for shape in SHAPES)


def _groups_table(arch: int) -> Iterator[Variant]:
    return (groups_variant(arch, dtype, shape) for dtype in FLOATS for shape in SHAPES)


def _combine_table(arch: int) -> Iterator[Variant]:
    return (combine_variant(arch, dtype, shape) for dtype in FLOATS for shape in SHAPES)


HEADS = Kernel("paged_attention", _paged_attention_heads, _heads_table)
GROUPS = Kernel("paged_attention", _paged_attention_groups, _groups_table)
COMBINE = Kernel("paged_attention", _paged_attention_combine, _combine_table)
KERNELS = (HEADS, GROUPS, COMBINE)


def paged_attention(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    k_cache_PSGD: Tensor,
    v_cache_PSGD: Tensor,
    block_table_BM: Tensor,
    positions_B: Tensor,
    rope_NC2: Tensor,
    scale: float,
) -> Tensor:
    """Two launches: a program for each (row, head, split), then one for each (row, head). Nothing here looks at what
    the tensors hold, so a CUDA graph may replay it at other positions and with other pages."""
    out_BHD = q_BHD.new_empty(q_BHD.shape)
    if q_BHD.numel() == 0:
        return out_BHD
    batch, heads, head_dim = q_BHD.shape
    page_slots, groups = k_cache_PSGD.shape[1:3]
    splits, ratio = splits_of(block_table_BM.shape[1], page_slots), heads // groups
    shape, arch = shape_of(head_dim), architecture(q_BHD.device) or 0
    partial, tops, totals = (
        torch.empty(batch * heads, splits, *width, dtype=torch.float32, device=q_BHD.device)
        for width in ((head_dim,), (), ())
    )
    q, k, v = (_readable(x, shape) for x in (q_BHD, k_BGD, v_BGD))
    table, positions, rope = aligned(block_table_BM), aligned(positions_B), aligned(rope_NC2.contiguous())
    tensors = q, k, v, k_cache_PSGD, v_cache_PSGD, table, positions, rope, partial, tops, totals
    strides = *_strides(shape, q, k, v), *table.stride(), positions.stride(0)
    dim = head_dim // shape.vector
    pages = page_slots, page_slots * groups * dim, groups * dim
    if ratio == 1:
        variant = heads_variant(arch, q.dtype, shape)
        arguments = *tensors, *strides, *pages, table.shape[1], dim, heads, splits, scale
        HEADS.launch((heads, splits, batch), arguments, dict(variant.constants), variant.num_warps)
    else:
        variant = groups_variant(arch, q.dtype, shape)
        arguments = *tensors, *strides, *pages, dim, heads, splits, ratio, scale
        grid = groups * triton.cdiv(ratio, QUERIES), splits, batch
        GROUPS.launch(grid, arguments, dict(variant.constants), variant.num_warps)
    variant = combine_variant(arch, q.dtype, shape)
    COMBINE.launch(
        (batch * heads,),
        (partial, tops, totals, positions, out_BHD, positions.stride(0), dim, heads, splits),
        dict(variant.constants),
        variant.num_warps,
    )
    return out_BHD


def _strides(shape: Shape, *tensors: Tensor) -> tuple[int, ...]:
    """Row and head strides, in vectors."""
    return tuple(each.stride(axis) // shape.vector for each in tensors for axis in range(2))


def _readable(x: Tensor, shape: Shape) -> Tensor:
    """The tensor, or a contiguous copy where its strides are not whole vectors. Views of a packed projection are."""
    fits = x.stride(2) == 1 and all(x.stride(axis) % shape.vector == 0 for axis in range(2))
    return aligned(x if fits else x.contiguous())
