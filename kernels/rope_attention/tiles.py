# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of rope_attention share: loading rotated tiles, and the dropout mask."""

from __future__ import annotations

import triton
import triton.language as tl

from retinar.kernels.philox.reference import DOMAIN_ATTENTION as _DOMAIN

DOMAIN = tl.constexpr(_DOMAIN)


@triton.jit
def load_tile(
    base, stride, start, positions, head_dim, ROWS: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
    INSIDE: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of a [N, D] matrix as [ROWS, 2 HALF], zeros where there is none.

    EXACT: D is 2 HALF; INSIDE: every row exists. The start is a 64-bit scalar product; within the tile, offsets have 32
    bits (the launcher sees to it that they suffice), do not change in a loop over tiles and cost half the registers.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, 2 * HALF)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride.to(tl.int32) + column[None, :])
    if EXACT and INSIDE:
        return tl.load(pointers)
    if EXACT:
        return tl.load(pointers, mask=(row < positions - start)[:, None], other=0.0)
    if INSIDE:
        return tl.load(pointers, mask=(column < head_dim)[None, :], other=0.0)
    return tl.load(pointers, mask=(row < positions - start)[:, None] & (column < head_dim)[None, :], other=0.0)


@triton.jit
def store_tile(
    base, stride, start, positions, head_dim, x, ROWS: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr
):
    """The rows and columns of a [ROWS, 2 HALF] tile that exist."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, 2 * HALF)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride.to(tl.int32) + column[None, :])
    inside = (row < positions - start)[:, None]
    if not EXACT:
        inside = inside & (column < head_dim)[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def pairs(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The even and the odd columns of [ROWS, 2 HALF]. A thread's 16-byte load holds whole pairs: nothing moves."""
    return tl.split(tl.reshape(x, (ROWS, HALF, 2)))


@triton.jit
def load_angles(
    rope, start, positions, head_dim, ROWS: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, INSIDE: tl.constexpr
):
    """cos and sin [ROWS, HALF] of the table [N, D / 2, 2]."""
    stride = head_dim.to(tl.int64)
    return pairs(load_tile(rope, stride, start, positions, head_dim, ROWS, HALF, EXACT, INSIDE), ROWS, HALF)


@triton.jit
def load_rotated(
    base, stride, rope, start, positions, head_dim, ROWS: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
    INSIDE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Rotated rows [ROWS, even half | odd half]: turned here, in fp32, and cast; or, TURNED, as `turn` wrote them.

    The halves are not interleaved again: a product of two rotated rows does not care, and gradients are interleaved
    once, when they are stored.
    """
    if TURNED:
        return load_tile(base, stride, start, positions, head_dim, ROWS, HALF, True, INSIDE)
    even, odd = pairs(load_tile(base, stride, start, positions, head_dim, ROWS, HALF, EXACT, INSIDE), ROWS, HALF)
    cos, sin = load_angles(rope, start, positions, head_dim, ROWS, HALF, EXACT, INSIDE)
    x, y = even.to(tl.float32), odd.to(tl.float32)
    turned = tl.join((x * cos - y * sin).to(even.dtype), (x * sin + y * cos).to(even.dtype))
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, 2 * HALF))


@triton.jit
def store_rotated_back(
    base, stride, rope, start, positions, head_dim, x, ROWS: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr
):
    """Turns fp32 rows [ROWS, even half | odd half] by the opposite angles, interleaves and stores them: the transpose
    of the rotation."""
    even, odd = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    cos, sin = load_angles(rope, start, positions, head_dim, ROWS, HALF, EXACT, False)
    back = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (ROWS, 2 * HALF))
    store_tile(base, stride, start, positions, head_dim, back, ROWS, HALF, EXACT)


@triton.jit
def kept(key, first_column, rows, head, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: which weights dropout keeps. One Philox call makes the bytes of 16 neighbouring columns."""
    block = (first_column // 16 + tl.arange(0, COLUMNS // 16)).to(tl.uint32)[None, :]
    query = rows.to(tl.uint32)[:, None]
    zero = (query ^ query) + (block ^ block)
    w0, w1, w2, w3 = tl.philox(key, block + zero, query + zero, head.to(tl.uint32) + zero, DOMAIN + zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS // 16, 4, 1))
    shift = (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, None, :]
    return tl.reshape((words >> shift) & 0xFF, (ROWS, COLUMNS)) >= threshold.to(tl.uint32)


@triton.jit
def dim_of(head_dim, VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr):
    """The head dim as int32; a constant's divisibility is known to the compiler."""
    if EXACT:
        return tl.full((), 2 * HALF, tl.int32)
    return head_dim.to(tl.int32) * VEC


@triton.jit(do_not_specialize=["xb", "xh", "xn", "positions", "head_dim", "heads", "blocks"])
def _rope_attention_turn(
    x, rope, out, xb: tl.int64, xh: tl.int64, xn: tl.int64, positions: tl.int64, head_dim: tl.int64, heads: tl.int64,
    blocks: tl.int64, VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotates q or k once, for kernels that would read it often: [B, H, N, D] to [B, H, N, even half | odd half]."""
    head = (tl.program_id(0) // blocks.to(tl.int32)).to(tl.int64)
    start = tl.program_id(0) % blocks.to(tl.int32) * ROWS
    b, h = head // heads, head % heads
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    x += (b * xb + h * xh) * VEC
    turned = load_rotated(x, xn * VEC, rope, start, n, dim, ROWS, HALF, EXACT, False, False)
    wide = tl.full((), 2 * HALF, tl.int64)
    store_tile(out + head * positions * (2 * HALF), wide, start, n, dim, turned, ROWS, HALF, True)
