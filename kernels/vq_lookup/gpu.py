"""Triton kernels of vq_lookup: normalise both sides, search the codes in splits, merge the splits; and the backward.

Normalised rows are kept in tiles [row block, channel, row in block], fp32, channels padded with zeros to whole steps:
then a block of codes is one piece of memory, and the 32 lanes of a warp, which hold 32 codes of one vector, read 32
neighbouring numbers. Products are plain fp32 multiply-adds over the channels in their order, the same for every code:
equal rows of the codebook give equal bits and tie.
"""

# Kernel functions take pointers and tiles, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, aligned, architecture

#: Channels of a step. Every tokenizer of LlamaGen's has 8; with one step the vectors stay in registers.
STEP = tl.constexpr(8)
#: Vectors and codes of a tile, and warps: 8 pairs a thread, 16 warps on a multiprocessor by their registers.
VECTORS, CODES = 32, 64
WARPS = 8
#: Programs that the search should have: two rounds of 132 multiprocessors with two blocks each. A constant rather than
#: the device's own number: what runs follows from the shapes alone. (The results do not depend on it.)
PROGRAMS = 512
#: Lengths below it count as it, as in torch's ``normalize``.
SHORTEST = tl.constexpr(1e-12)
#: Above every code.
NONE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["count", "channels", "row_stride", "channel_stride"])
def _vq_lookup_normalize(
    x, tiles, nan, count: tl.int64, channels: tl.int64, row_stride: tl.int64, channel_stride: tl.int64,
    ROWS: tl.constexpr
):  # fmt: skip
    """One program: a tile of ROWS rows, and the lowest row of it that has a NaN (else NONE).

    Rows past the end repeat the last one, so that nobody needs to mask them: a later copy loses every tie.
    """
    tile = tl.program_id(0).to(tl.int64)
    row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), count - 1)
    x += row[:, None] * row_stride
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, STEP):
        channel = start + tl.arange(0, STEP)[None, :]
        v = tl.load(x + channel * channel_stride, mask=channel < channels, other=0.0).to(tl.float32)
        squares += tl.sum(v * v, 1)
    length = tl.sqrt_rn(squares)
    length = tl.where(length < SHORTEST, SHORTEST, length)  # a NaN stays one, which a maximum would not promise
    steps = tl.cdiv(tl.maximum(channels, 1), STEP)
    tiles += tile * (steps * STEP * ROWS) + tl.arange(0, ROWS)[:, None]
    worst = tl.zeros([ROWS], tl.int32)
    for start in range(0, steps * STEP, STEP):
        channel = start + tl.arange(0, STEP)[None, :]
        v = tl.load(x + channel * channel_stride, mask=channel < channels, other=0.0).to(tl.float32)
        n = tl.div_rn(v, length[:, None])
        worst = tl.maximum(worst, tl.max((n != n).to(tl.int32), 1))
        tl.store(tiles + channel * ROWS, n)
    tl.store(nan + tile, tl.min(tl.where(worst > 0, row.to(tl.int32), NONE), 0))


@triton.jit
def _add_products(sums, z, codes, VECTORS: tl.constexpr, CODES: tl.constexpr):
    """``sums`` [VECTORS, CODES] plus the products of a step of channels; z is [VECTORS, 1] and codes [1, CODES]."""
    for channel in tl.static_range(STEP):
        sums += tl.load(z + channel * VECTORS) * tl.load(codes + channel * CODES)
    return sums


@triton.jit(do_not_specialize=["steps", "blocks", "blocks_each", "padded"])
def _vq_lookup_search(
    z, codes, values, winners, steps: tl.int64, blocks: tl.int64, blocks_each: tl.int64, padded: tl.int64,
    ONE_STEP: tl.constexpr, VECTORS: tl.constexpr, CODES: tl.constexpr
):  # fmt: skip
    """One program: a tile of vectors against one split of the blocks of codes -> best similarity and its code.

    Every place of the tile keeps its own best block, so nothing crosses lanes before the end. A NaN is never better:
    without any better code the value stays -inf, and the code is some code that exists.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    z += tile * (steps * STEP * VECTORS) + tl.arange(0, VECTORS)[:, None]
    first = split * blocks_each
    last = tl.minimum(first + blocks_each, blocks)
    codes += first * (steps * STEP * CODES) + tl.arange(0, CODES)[None, :]
    best = tl.full([VECTORS, CODES], float("-inf"), tl.float32)
    winner = tl.zeros([VECTORS, CODES], tl.int32)
    for block in range(first.to(tl.int32), last.to(tl.int32)):
        sums = tl.zeros([VECTORS, CODES], tl.float32)
        if ONE_STEP:
            sums = _add_products(sums, z, codes, VECTORS, CODES)
        else:
            for step in range(steps):
                sums = _add_products(sums, z + step * (STEP * VECTORS), codes + step * (STEP * CODES), VECTORS, CODES)
        codes += steps * STEP * CODES
        better = sums > best  # strictly: of equal ones the lowest block stays
        best = tl.where(better, sums, best)
        winner = tl.where(better, block, winner)
    value = tl.max(best, 1)
    code = winner * CODES + tl.arange(0, CODES)[None, :]
    code = tl.min(tl.where(best == value[:, None], code, NONE), 1)
    place = split * padded + tile * VECTORS + tl.arange(0, VECTORS)
    tl.store(values + place, value)
    tl.store(winners + place, code)


@triton.jit(do_not_specialize=["count", "channels", "splits", "padded", "tiles"])
def _vq_lookup_merge(
    values, winners, codebook, nan, out, quantized, count: tl.int64, channels: tl.int64, splits: tl.int64,
    padded: tl.int64, tiles: tl.int64, VECTORS: tl.constexpr, CODES: tl.constexpr
):  # fmt: skip
    """One program: the best over the splits of VECTORS vectors, and the codes' normalised rows.

    As in the reference, where argmax takes the first NaN: a codebook row with one wins over all vectors without one,
    and a vector with one gets code 0.
    """
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    best = tl.full([VECTORS], float("-inf"), tl.float32)
    code = tl.zeros([VECTORS], tl.int32)
    for split in range(splits):
        value = tl.load(values + split * padded + vector)
        better = value > best
        best = tl.where(better, value, best)
        code = tl.where(better, tl.load(winners + split * padded + vector), code)
    spoilt = tl.full([CODES], NONE, tl.int32)
    for start in range(0, tiles, CODES):
        tile = start + tl.arange(0, CODES)
        spoilt = tl.minimum(spoilt, tl.load(nan + tile, mask=tile < tiles, other=NONE))
    first = tl.min(spoilt, 0)
    code = tl.where((best > float("-inf")) & (first != NONE), first, code)
    inside = vector < count
    tl.store(out + vector, code.to(tl.int64), mask=inside)
    steps = tl.cdiv(channels, STEP)
    code = code.to(tl.int64)[:, None]
    codebook += (code // CODES) * (steps * STEP * CODES) + code % CODES
    quantized += vector[:, None] * channels
    for start in range(0, channels, STEP):
        channel = start + tl.arange(0, STEP)[None, :]
        mask = inside[:, None] & (channel < channels)
        tl.store(quantized + channel, tl.load(codebook + channel * CODES, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["count", "channels", "grad_row", "grad_channel", "z_row", "z_channel"])
def _vq_lookup_backward(
    grad, z, out, count: tl.int64, channels: tl.int64, grad_row: tl.int64, grad_channel: tl.int64, z_row: tl.int64,
    z_channel: tl.int64, ROWS: tl.constexpr
):  # fmt: skip
    """One program: ROWS rows of (g - n (g . n)) / |z| with n = z / |z|; only the first pass finds nothing cached."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    grad += row * grad_row
    z += row * z_row
    out += row * channels
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, STEP):
        channel = start + tl.arange(0, STEP)[None, :]
        inside = (row < count) & (channel < channels)
        v = tl.load(z + channel * z_channel, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(v * v, 1)
    length = tl.sqrt_rn(squares)
    safe = tl.where(length < SHORTEST, SHORTEST, length)[:, None]
    along = tl.zeros([ROWS], tl.float32)
    for start in range(0, channels, STEP):
        channel = start + tl.arange(0, STEP)[None, :]
        inside = (row < count) & (channel < channels)
        g = tl.load(grad + channel * grad_channel, mask=inside, other=0.0)
        v = tl.load(z + channel * z_channel, mask=inside, other=0.0).to(tl.float32)
        # n before the product, as in the reference: with one channel it is 1, and what is left of g exactly 0.
        along += tl.sum(g * tl.div_rn(v, safe), 1)
    along = tl.where(length < SHORTEST, 0.0, along)[:, None]
    for start in range(0, channels, STEP):
        channel = start + tl.arange(0, STEP)[None, :]
        inside = (row < count) & (channel < channels)
        g = tl.load(grad + channel * grad_channel, mask=inside, other=0.0)
        v = tl.load(z + channel * z_channel, mask=inside, other=0.0).to(tl.float32)
        y = tl.div_rn(g - tl.div_rn(v, safe) * along, safe)
        tl.store(out + channel, y.to(out.dtype.element_ty), mask=inside)


def _normalize_table(architecture: int) -> Iterator[Variant]:
    for dtype in FLOATS:
        for rows in (VECTORS, CODES):
            yield Variant(architecture, (TYPES[dtype], "fp32", "i32"), (("ROWS", rows),), 4)


def search_variant(channels: int, architecture: int) -> Variant:
    """Of the search, whose one-step form keeps the vectors in registers."""
    constants = (("ONE_STEP", channels <= STEP.value), ("VECTORS", VECTORS), ("CODES", CODES))
    return Variant(architecture, ("fp32", "fp32", "fp32", "i32"), constants, WARPS)


def _search_table(architecture: int) -> Iterator[Variant]:
    return (search_variant(channels, architecture) for channels in (STEP.value, STEP.value + 1))


def _merge_table(architecture: int) -> Iterator[Variant]:
    pointers = ("fp32", "i32", "fp32", "i32", "i64", "fp32")
    yield Variant(architecture, pointers, (("VECTORS", VECTORS), ("CODES", CODES)), 1)


def _backward_table(architecture: int) -> Iterator[Variant]:
    for dtype in FLOATS:
        yield Variant(architecture, ("fp32", TYPES[dtype], TYPES[dtype]), (("ROWS", CODES),), 4)


NORMALIZE = Kernel("vq_lookup", _vq_lookup_normalize, _normalize_table)
SEARCH = Kernel("vq_lookup", _vq_lookup_search, _search_table)
MERGE = Kernel("vq_lookup", _vq_lookup_merge, _merge_table)
BACKWARD = Kernel("vq_lookup", _vq_lookup_backward, _backward_table)
KERNELS = (NORMALIZE, SEARCH, MERGE, BACKWARD)


def code_splits(vectors: int, codes: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """(number of splits, blocks of codes in each): about so many programs for few vectors, one split for many."""
    blocks = triton.cdiv(codes, CODES)
    wanted = triton.cdiv(programs, triton.cdiv(vectors, VECTORS))
    each = triton.cdiv(blocks, min(wanted, blocks))
    return triton.cdiv(blocks, each), each


def vq_lookup(z: Tensor, codebook: Tensor, programs: int = PROGRAMS) -> tuple[Tensor, Tensor]:
    """The nearest codes' normalised rows [N, C] in fp32, and the codes int64 [N]. ``programs``: of the search."""
    count, channels = z.shape
    quantized = z.new_empty(count, channels, dtype=torch.float32)
    codes = z.new_empty(count, dtype=torch.int64)
    if count == 0:
        return quantized, codes
    tiles_z, _ = _tiles(z, VECTORS)
    tiles_codes, nan = _tiles(codebook if codebook.dtype in FLOATS else codebook.float(), CODES)
    splits, each = code_splits(count, codebook.shape[0], programs)
    padded = triton.cdiv(count, VECTORS) * VECTORS
    values = z.new_empty(splits, padded, dtype=torch.float32)
    winners = z.new_empty(splits, padded, dtype=torch.int32)
    blocks, steps = tiles_codes.shape[:2]
    searched = tiles_z, tiles_codes, values, winners, steps, blocks, each, padded
    variant = search_variant(channels, architecture(z.device) or 0)
    SEARCH.launch((padded // VECTORS, splits), searched, dict(variant.constants), variant.num_warps)
    merged = values, winners, tiles_codes, nan, codes, quantized, count, channels, splits, padded, blocks
    MERGE.launch((padded // VECTORS,), merged, {"VECTORS": VECTORS, "CODES": CODES}, 1)
    return quantized, codes


def _tiles(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(normalised tiles [blocks, steps, STEP, rows], lowest row with a NaN of each block)."""
    x = aligned(x)
    blocks, steps = triton.cdiv(x.shape[0], rows), max(1, triton.cdiv(x.shape[1], STEP.value))
    tiles = x.new_empty(blocks, steps, STEP.value, rows, dtype=torch.float32)
    nan = x.new_empty(blocks, dtype=torch.int32)
    NORMALIZE.launch((blocks,), (x, tiles, nan, *x.shape, *x.stride()), {"ROWS": rows}, 4)
    return tiles, nan


def normalize_backward(grad: Tensor, z: Tensor) -> Tensor:
    """The straight-through gradient [N, C] of z, in its dtype and contiguous."""
    out = z.new_empty(z.shape)
    if out.numel():
        grad, z = aligned(grad.float()), aligned(z)
        arguments = grad, z, out, *z.shape, *grad.stride(), *z.stride()
        BACKWARD.launch((triton.cdiv(z.shape[0], CODES),), arguments, {"ROWS": CODES}, 4)
    return out
