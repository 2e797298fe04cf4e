# mypy: disable-error-code="no-untyped-def"
"""The backward Triton kernels of rope_attention: row sums, then key and value gradients, then query gradients.

Scores are computed twice, once for each of the two big kernels, so that every sum runs in one program in one order:
the gradients' bits do not change from run to run, which sums by atomic additions would not promise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retinar.kernels.rope_attention.forward import LOG2E
from retinar.kernels.rope_attention.tiles import (
    dim_of,
    kept,
    load_rotated,
    load_tile,
    store_rotated_back,
    store_tile,
)

_STRIDES = ["qb", "qh", "qn", "kb", "kg", "kn", "vb", "vg", "vn", "gb", "gh", "gn"]
_SIZES = ["positions", "head_dim", "heads", "ratio", "threshold"]


@triton.jit(do_not_specialize=["gb", "gh", "gn", "ob", "oh", "on", "positions", "head_dim", "heads"])
def _rope_attention_backward_row_sums(
    grad, out, sums, gb: tl.int64, gh: tl.int64, gn: tl.int64, ob: tl.int64, oh: tl.int64, on: tl.int64,
    positions: tl.int64, head_dim: tl.int64, heads: tl.int64,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O): with or without dropout it is rowsum(dP * P), without the N x N matrices."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    do = load_tile(grad + (b * gb + h * gh) * VEC, gn * VEC, first, n, dim, ROWS, HALF, EXACT, False)
    o = load_tile(out + (b * ob + h * oh) * VEC, on * VEC, first, n, dim, ROWS, HALF, EXACT, False)
    sums_R = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(sums + head * positions + rows, sums_R, mask=rows < n)


@triton.jit
def _collect(
    dk, dv, k_tile, v_tile, q, grad, rope, lse, sums, key, q_stride, g_stride, first, head,
    positions, head_dim, threshold, scale, keep_scale, low, high,
    HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TURNED: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Queries low .. high into the gradients of the keys and values from ``first`` on.

    Everything is transposed, [COLUMNS, ROWS]. INSIDE: all the queries exist and come after every key.
    """
    for start in range(low, high, ROWS):
        rows = start + tl.arange(0, ROWS)
        q_tile = load_rotated(q, q_stride, rope, start, positions, head_dim, ROWS, HALF, EXACT, INSIDE, TURNED)
        # A row that does not exist has an infinite sum: exp2(s - inf) = 0.
        lse_R = tl.load(lse + rows) if INSIDE else tl.load(lse + rows, mask=rows < positions, other=float("inf"))
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        p = tl.exp2(scores * (scale * LOG2E) - (lse_R * LOG2E)[None, :])
        if not INSIDE:
            p = tl.where(rows[None, :] >= (first + tl.arange(0, COLUMNS))[:, None], p, 0.0)
        do = load_tile(grad, g_stride, start, positions, head_dim, ROWS, HALF, EXACT, INSIDE)
        dp = tl.dot(v_tile, tl.trans(do), input_precision="ieee")
        if DROPOUT:
            keep = tl.trans(kept(key, first, rows, head, threshold, ROWS, COLUMNS))
            dv = tl.dot(tl.where(keep, p, 0.0).to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        sums_R = tl.load(sums + rows) if INSIDE else tl.load(sums + rows, mask=rows < positions, other=0.0)
        ds = (p * (dp - sums_R[None, :])).to(do.dtype)
        dk = tl.dot(ds, q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=[*_STRIDES, "db", "dh", "dn", "eb", "eh", "en", *_SIZES])
def _rope_attention_backward_kv(
    grad, q, k, v, rope, seed, lse, sums, grad_k, grad_v,
    qb: tl.int64, qh: tl.int64, qn: tl.int64, kb: tl.int64, kg: tl.int64, kn: tl.int64,
    vb: tl.int64, vg: tl.int64, vn: tl.int64, gb: tl.int64, gh: tl.int64, gn: tl.int64,
    db: tl.int64, dh: tl.int64, dn: tl.int64, eb: tl.int64, eh: tl.int64, en: tl.int64,
    positions: tl.int64, head_dim: tl.int64, heads: tl.int64, ratio: tl.int64, threshold: tl.int64,
    scale: tl.float32, keep_scale: tl.float32,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS keys and values, over the queries of one head from them on. TURNED: q and k were rotated
    before."""
    first = tl.program_id(0) * COLUMNS
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    g = h // ratio
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    q += (b * qb + h * qh) * VEC
    k += (b * kb + g * kg) * VEC
    v += (b * vb + g * vg) * VEC
    grad += (b * gb + h * gh) * VEC
    lse += head * positions
    sums += head * positions
    k_tile = load_rotated(k, kn * VEC, rope, first, n, dim, COLUMNS, HALF, EXACT, False, TURNED)
    v_tile = load_tile(v, vn * VEC, first, n, dim, COLUMNS, HALF, EXACT, False)
    key = tl.load(seed)
    dk = tl.zeros((COLUMNS, 2 * HALF), tl.float32)
    dv = tl.zeros((COLUMNS, 2 * HALF), tl.float32)
    # Three stretches of queries: those among the keys, those after them, and the block that the end cuts.
    after = tl.minimum(first + COLUMNS, n)
    whole = after + (n - after) // ROWS * ROWS
    dk, dv = _collect(
        dk, dv, k_tile, v_tile, q, grad, rope, lse, sums, key, qn * VEC, gn * VEC, first, head, n, dim, threshold,
        scale, keep_scale, first, after, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, False,
    )  # fmt: skip
    dk, dv = _collect(
        dk, dv, k_tile, v_tile, q, grad, rope, lse, sums, key, qn * VEC, gn * VEC, first, head, n, dim, threshold,
        scale, keep_scale, after, whole, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, True,
    )  # fmt: skip
    dk, dv = _collect(
        dk, dv, k_tile, v_tile, q, grad, rope, lse, sums, key, qn * VEC, gn * VEC, first, head, n, dim, threshold,
        scale, keep_scale, whole, n, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, False,
    )  # fmt: skip
    dv *= keep_scale
    store_tile(grad_v + (b * eb + h * eh) * VEC, en * VEC, first, n, dim, dv, COLUMNS, HALF, EXACT)
    grad_k += (b * db + h * dh) * VEC
    store_rotated_back(grad_k, dn * VEC, rope, first, n, dim, dk * scale, COLUMNS, HALF, EXACT)


@triton.jit
def _gather(
    dq, q_tile, do, lse_R, sums_R, k, v, rope, key, k_stride, v_stride, rows, head, positions,
    head_dim, threshold, scale, keep_scale, low, high,
    HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TURNED: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Keys low .. high into the gradient of one block of queries."""
    for start in range(low, high, COLUMNS):
        k_tile = load_rotated(k, k_stride, rope, start, positions, head_dim, COLUMNS, HALF, EXACT, INSIDE, TURNED)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        p = tl.exp2(scores * (scale * LOG2E) - (lse_R * LOG2E)[:, None])
        if not INSIDE:
            p = tl.where(rows[:, None] >= (start + tl.arange(0, COLUMNS))[None, :], p, 0.0)
        v_tile = load_tile(v, v_stride, start, positions, head_dim, COLUMNS, HALF, EXACT, INSIDE)
        dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        if DROPOUT:
            dp = tl.where(kept(key, start, rows, head, threshold, ROWS, COLUMNS), dp * keep_scale, 0.0)
        ds = (p * (dp - sums_R[:, None])).to(do.dtype)
        dq = tl.dot(ds, k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=[*_STRIDES, "db", "dh", "dn", *_SIZES])
def _rope_attention_backward_q(
    grad, q, k, v, rope, seed, lse, sums, grad_q,
    qb: tl.int64, qh: tl.int64, qn: tl.int64, kb: tl.int64, kg: tl.int64, kn: tl.int64,
    vb: tl.int64, vg: tl.int64, vn: tl.int64, gb: tl.int64, gh: tl.int64, gn: tl.int64,
    db: tl.int64, dh: tl.int64, dn: tl.int64,
    positions: tl.int64, head_dim: tl.int64, heads: tl.int64, ratio: tl.int64, threshold: tl.int64,
    scale: tl.float32, keep_scale: tl.float32,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head, over all keys up to them. TURNED: q and k were rotated before."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    g = h // ratio
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    q += (b * qb + h * qh) * VEC
    q_tile = load_rotated(q, qn * VEC, rope, first, n, dim, ROWS, HALF, EXACT, False, TURNED)
    do = load_tile(grad + (b * gb + h * gh) * VEC, gn * VEC, first, n, dim, ROWS, HALF, EXACT, False)
    lse_R = tl.load(lse + head * positions + rows, mask=rows < n, other=float("inf"))
    sums_R = tl.load(sums + head * positions + rows, mask=rows < n, other=0.0)
    k += (b * kb + g * kg) * VEC
    v += (b * vb + g * vg) * VEC
    key = tl.load(seed)
    dq = tl.zeros((ROWS, 2 * HALF), tl.float32)
    dq = _gather(
        dq, q_tile, do, lse_R, sums_R, k, v, rope, key, kn * VEC, vn * VEC, rows, head, n, dim,
        threshold, scale, keep_scale, 0, first, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, True,
    )  # fmt: skip
    dq = _gather(
        dq, q_tile, do, lse_R, sums_R, k, v, rope, key, kn * VEC, vn * VEC, rows, head, n, dim,
        threshold, scale, keep_scale, first, tl.minimum(first + ROWS, n), HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED,
        False,
    )  # fmt: skip
    grad_q += (b * db + h * dh) * VEC
    store_rotated_back(grad_q, dn * VEC, rope, first, n, dim, dq * scale, ROWS, HALF, EXACT)
