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

STRETCH = tl.constexpr(128)  # rows that scratch memory is a multiple of: no tile has more
_STRIDES = ["qb", "qh", "qn", "kb", "kg", "kn", "vb", "vg", "vn", "gb", "gh", "gn"]
_SIZES = ["positions", "padded", "head_dim", "heads", "ratio", "threshold", "blocks"]


@triton.jit(
    do_not_specialize=["gb", "gh", "gn", "ob", "oh", "on", "positions", "padded", "head_dim", "heads", "blocks"]
)
def _rope_attention_backward_row_sums(
    grad, out, lse, lse2, sums, gb: tl.int64, gh: tl.int64, gn: tl.int64, ob: tl.int64, oh: tl.int64, on: tl.int64,
    positions: tl.int64, padded: tl.int64, head_dim: tl.int64, heads: tl.int64, blocks: tl.int64,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O), which with or without dropout is rowsum(dP * P), and the log-sum-exp in base 2.

    Both go to scratch memory with rows up to a multiple of `STRETCH` (``padded`` of them), so that the kernels after
    this one read it without masks and in 16-byte pieces. A row that does not exist has an infinite log-sum-exp:
    exp2(s - inf) = 0.
    """
    head = (tl.program_id(0) // blocks.to(tl.int32)).to(tl.int64)
    first = tl.program_id(0) % blocks.to(tl.int32) * ROWS
    b, h = head // heads, head % heads
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    do = load_tile(grad + (b * gb + h * gh) * VEC, gn * VEC, first, n, dim, ROWS, HALF, EXACT, False)
    o = load_tile(out + (b * ob + h * oh) * VEC, on * VEC, first, n, dim, ROWS, HALF, EXACT, False)
    lse_R = tl.load(lse + head * positions + rows, mask=rows < n, other=float("inf"))
    place = head * (padded * STRETCH) + rows
    tl.store(lse2 + place, lse_R * LOG2E)
    tl.store(sums + place, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1))


@triton.jit
def _collect(
    dk, dv, k_tile, v_tile, q, grad, rope, lse2, sums, key, q_stride, g_stride, first, head, positions, head_dim,
    threshold, scale, keep_scale, low, high, after,
    HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TURNED: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Blocks low .. high of queries into the gradients of the keys and values from ``first`` on.

    Everything is transposed, [COLUMNS, ROWS]. INSIDE: all the queries exist and come after every key. Otherwise the
    blocks up to ``after`` are those on the diagonal, and the one after them is the block that the end cuts.
    """
    for block in range(low, high):
        start = block * ROWS if INSIDE else tl.where(block < after, block, positions // ROWS) * ROWS
        rows = start + tl.arange(0, ROWS)
        q_tile = load_rotated(q, q_stride, rope, start, positions, head_dim, ROWS, HALF, EXACT, INSIDE, TURNED)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        p = tl.exp2(scores * (scale * LOG2E) - tl.load(lse2 + rows)[None, :])
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
        ds = (p * (dp - tl.load(sums + rows)[None, :])).to(do.dtype)
        dk = tl.dot(ds, q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=[*_STRIDES, "db", "dh", "dn", "eb", "eh", "en", *_SIZES])
def _rope_attention_backward_kv(
    grad, q, k, v, rope, seed, lse2, sums, grad_k, grad_v,
    qb: tl.int64, qh: tl.int64, qn: tl.int64, kb: tl.int64, kg: tl.int64, kn: tl.int64,
    vb: tl.int64, vg: tl.int64, vn: tl.int64, gb: tl.int64, gh: tl.int64, gn: tl.int64,
    db: tl.int64, dh: tl.int64, dn: tl.int64, eb: tl.int64, eh: tl.int64, en: tl.int64,
    positions: tl.int64, padded: tl.int64, head_dim: tl.int64, heads: tl.int64, ratio: tl.int64, threshold: tl.int64,
    blocks: tl.int64, scale: tl.float32, keep_scale: tl.float32,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS keys and values, over the queries of one head from them on. TURNED: q and k were rotated
    before."""
    head = (tl.program_id(0) // blocks.to(tl.int32)).to(tl.int64)
    first = tl.program_id(0) % blocks.to(tl.int32) * COLUMNS
    b, h = head // heads, head % heads
    g = h // ratio
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    q += (b * qb + h * qh) * VEC
    k += (b * kb + g * kg) * VEC
    v += (b * vb + g * vg) * VEC
    grad += (b * gb + h * gh) * VEC
    lse2 += head * (padded * STRETCH)
    sums += head * (padded * STRETCH)
    k_tile = load_rotated(k, kn * VEC, rope, first, n, dim, COLUMNS, HALF, EXACT, False, TURNED)
    v_tile = load_tile(v, vn * VEC, first, n, dim, COLUMNS, HALF, EXACT, False)
    key = tl.load(seed)
    dk = tl.zeros((COLUMNS, 2 * HALF), tl.float32)
    dv = tl.zeros((COLUMNS, 2 * HALF), tl.float32)
    # First the queries after all these keys, then, with masks, those among them and the block that the end cuts. (One
    # masked loop, and after the other: ptxas then lets the products of the tensor cores overlap.)
    low = first // ROWS
    after = low + tl.minimum(COLUMNS // ROWS, tl.cdiv(n - first, ROWS))
    cut = ((n % ROWS != 0) & (n // ROWS >= low + COLUMNS // ROWS)).to(tl.int32)
    dk, dv = _collect(
        dk, dv, k_tile, v_tile, q, grad, rope, lse2, sums, key, qn * VEC, gn * VEC, first, head, n, dim, threshold,
        scale, keep_scale, low + COLUMNS // ROWS, n // ROWS, 0, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, True,
    )  # fmt: skip
    dk, dv = _collect(
        dk, dv, k_tile, v_tile, q, grad, rope, lse2, sums, key, qn * VEC, gn * VEC, first, head, n, dim, threshold,
        scale, keep_scale, low, after + cut, after, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, False,
    )  # fmt: skip
    dv *= keep_scale
    store_tile(grad_v + (b * eb + h * eh) * VEC, en * VEC, first, n, dim, dv, COLUMNS, HALF, EXACT)
    grad_k += (b * db + h * dh) * VEC
    store_rotated_back(grad_k, dn * VEC, rope, first, n, dim, dk * scale, COLUMNS, HALF, EXACT)


@triton.jit
def _gather(
    dq, q_tile, do, lse2_R, sums_R, k, v, rope, key, k_stride, v_stride, rows, head, positions,
    head_dim, threshold, scale, keep_scale, low, high,
    HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TURNED: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Keys low .. high into the gradient of one block of queries."""
    for start in range(low, high, COLUMNS):
        k_tile = load_rotated(k, k_stride, rope, start, positions, head_dim, COLUMNS, HALF, EXACT, INSIDE, TURNED)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        p = tl.exp2(scores * (scale * LOG2E) - lse2_R[:, None])
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
    grad, q, k, v, rope, seed, lse2, sums, grad_q,
    qb: tl.int64, qh: tl.int64, qn: tl.int64, kb: tl.int64, kg: tl.int64, kn: tl.int64,
    vb: tl.int64, vg: tl.int64, vn: tl.int64, gb: tl.int64, gh: tl.int64, gn: tl.int64,
    db: tl.int64, dh: tl.int64, dn: tl.int64,
    positions: tl.int64, padded: tl.int64, head_dim: tl.int64, heads: tl.int64, ratio: tl.int64, threshold: tl.int64,
    blocks: tl.int64, scale: tl.float32, keep_scale: tl.float32,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head, over all keys up to them. TURNED: q and k were rotated before."""
    head = (tl.program_id(0) // blocks.to(tl.int32)).to(tl.int64)
    first = (blocks.to(tl.int32) - 1 - tl.program_id(0) % blocks.to(tl.int32)) * ROWS
    b, h = head // heads, head % heads
    g = h // ratio
    dim = dim_of(head_dim, VEC, HALF, EXACT)
    n = positions.to(tl.int32)
    rows = first + tl.arange(0, ROWS)
    q += (b * qb + h * qh) * VEC
    q_tile = load_rotated(q, qn * VEC, rope, first, n, dim, ROWS, HALF, EXACT, False, TURNED)
    do = load_tile(grad + (b * gb + h * gh) * VEC, gn * VEC, first, n, dim, ROWS, HALF, EXACT, False)
    lse2_R = tl.load(lse2 + head * (padded * STRETCH) + rows)
    sums_R = tl.load(sums + head * (padded * STRETCH) + rows)
    k += (b * kb + g * kg) * VEC
    v += (b * vb + g * vg) * VEC
    key = tl.load(seed)
    dq = tl.zeros((ROWS, 2 * HALF), tl.float32)
    dq = _gather(
        dq, q_tile, do, lse2_R, sums_R, k, v, rope, key, kn * VEC, vn * VEC, rows, head, n, dim,
        threshold, scale, keep_scale, 0, first, HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED, True,
    )  # fmt: skip
    dq = _gather(
        dq, q_tile, do, lse2_R, sums_R, k, v, rope, key, kn * VEC, vn * VEC, rows, head, n, dim,
        threshold, scale, keep_scale, first, tl.minimum(first + ROWS, n), HALF, EXACT, DROPOUT, ROWS, COLUMNS, TURNED,
        False,
    )  # fmt: skip
    grad_q += (b * db + h * dh) * VEC
    store_rotated_back(grad_q, dn * VEC, rope, first, n, dim, dq * scale, ROWS, HALF, EXACT)
