# mypy: disable-error-code="no-untyped-def"
"""The forward Triton kernel of rope_attention: online softmax over the blocks of keys that causality leaves."""

from __future__ import annotations

import triton
import triton.language as tl

from retinar.kernels.rope_attention.tiles import dim_of, kept, load_rotated, load_tile, store_tile

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    o, total, top, q_tile, k, v, rope, key, k_stride, v_stride, rows, head, positions, head_dim, threshold,
    scale, low, high, HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Keys low .. high for one block of queries; INSIDE: all of them exist and come before every query.

    ``scale`` has log2(e) in it: exp2 is one instruction, exp two.
    """
    for start in range(low, high, COLUMNS):
        k_tile = load_rotated(k, k_stride, rope, start, positions, head_dim, COLUMNS, HALF, EXACT, INSIDE, TURNED)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if not INSIDE:
            scores = tl.where(rows[:, None] >= (start + tl.arange(0, COLUMNS))[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        if DROPOUT:
            p = tl.where(kept(key, start, rows, head, threshold, ROWS, COLUMNS), p, 0.0)
        v_tile = load_tile(v, v_stride, start, positions, head_dim, COLUMNS, HALF, EXACT, INSIDE)
        o = tl.dot(p.to(v_tile.dtype), v_tile, o * shrink[:, None], input_precision="ieee")
    return o, total, top


@triton.jit(
    do_not_specialize=[
        "qb", "qh", "qn", "kb", "kg", "kn", "vb", "vg", "vn", "ob", "oh", "on", "positions", "head_dim", "heads",
        "ratio", "threshold", "blocks",
    ]
)  # fmt: skip
def _rope_attention_forward(
    q, k, v, rope, seed, out, lse,
    qb: tl.int64, qh: tl.int64, qn: tl.int64, kb: tl.int64, kg: tl.int64, kn: tl.int64,
    vb: tl.int64, vg: tl.int64, vn: tl.int64, ob: tl.int64, oh: tl.int64, on: tl.int64,
    positions: tl.int64, head_dim: tl.int64, heads: tl.int64, ratio: tl.int64, threshold: tl.int64,
    blocks: tl.int64, scale: tl.float32, keep_scale: tl.float32,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head. Of a head's blocks, the long ones start first.

    Strides and the head dim come in units of VEC elements; ``ratio`` query heads share a key-value head. TURNED: k was
    rotated before.
    """
    head = (tl.program_id(0) // blocks.to(tl.int32)).to(tl.int64)
    first = (blocks.to(tl.int32) - 1 - tl.program_id(0) % blocks.to(tl.int32)) * ROWS
    b, h = head // heads, head % heads
    g = h // ratio
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    q += (b * qb + h * qh) * VEC
    q_tile = load_rotated(q, qn * VEC, rope, first, n, dim, ROWS, HALF, EXACT, False, False)
    k += (b * kb + g * kg) * VEC
    v += (b * vb + g * vg) * VEC
    key = tl.load(seed)
    o = tl.zeros((ROWS, 2 * HALF), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    o, total, top = _attend(
        o, total, top, q_tile, k, v, rope, key, kn * VEC, vn * VEC, rows, head, n, dim, threshold,
        scale * LOG2E, 0, first, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, True,
    )  # fmt: skip
    o, total, top = _attend(
        o, total, top, q_tile, k, v, rope, key, kn * VEC, vn * VEC, rows, head, n, dim, threshold,
        scale * LOG2E, first, tl.minimum(first + ROWS, n), HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, False,
    )  # fmt: skip
    o = o * (keep_scale / total)[:, None]
    store_tile(out + (b * ob + h * oh) * VEC, on * VEC, first, n, dim, o, ROWS, HALF, EXACT)
    tl.store(lse + head * positions + rows, (top + tl.log2(total)) * LN2, mask=rows < n)
