"""The Triton kernels of paged_attention: attention of a row over one split of its slots, and the sum over the splits.

A split is a fixed run of slots. The one that holds the row's new slot rotates and stores the new key, stores the new
value, and begins its softmax with both of them out of registers: nobody reads that slot from memory in this launch.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp two


@triton.jit
def _width(head_dim, VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr):
    """The head dim as int32; a constant's divisibility is known to the compiler."""
    if EXACT:
        return tl.full((), 2 * HALF, tl.int32)
    return head_dim.to(tl.int32) * VEC


@triton.jit
def _turned(x, row_stride, rows, angles, dim, ROWS: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr):
    """[ROWS, 2 HALF]: the first ``rows`` rows of a matrix, turned by one position's angles in fp32 and cast; else 0."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 2 * HALF)[None, :]
    inside = row < rows
    if EXACT:
        angles_tile = tl.load(angles + column)
    else:
        angles_tile = tl.load(angles + column, mask=column < dim, other=0.0)
        inside = inside & (column < dim)
    x_tile = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    cos, sin = tl.split(tl.reshape(angles_tile, (1, HALF, 2)))
    even, odd = tl.split(tl.reshape(x_tile, (ROWS, HALF, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, (ROWS, 2 * HALF)).to(x.dtype.element_ty)


@triton.jit
def _place(table, table_stride, slot, page_slots, page_stride, slot_stride, mask):
    """Where slots begin in the cache, in vectors, as int64; one page number is read for each slot, out of the L1 cache
    but for the first of a page, so that any page size does."""
    page = tl.load(table + (slot // page_slots) * table_stride, mask=mask, other=0).to(tl.int64)
    return page * page_stride + (slot % page_slots) * slot_stride


@triton.jit
def _old(cache, place, old, dim, HALF: tl.constexpr, EXACT: tl.constexpr):
    """Keys or values [slots, 2 HALF] of the slots that are ``old``, in the cache's dtype; zeros for the others."""
    column = tl.arange(0, 2 * HALF)[None, :]
    inside = old[:, None]
    if not EXACT:
        inside = inside & (column < dim)
    return tl.load(cache + place[:, None] + column, mask=inside, other=0.0)


@triton.jit
def _write(
    k, v, k_cache, v_cache, table, angles, tm, position, page_slots, page_stride, slot_stride, writes, dim,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The new rotated key and the new value [2 HALF]; ``writes``: into the cache too."""
    column = tl.arange(0, 2 * HALF)
    k_new = tl.reshape(_turned(k, 0, 1, angles, dim, 1, HALF, EXACT), (2 * HALF,))
    v_new = tl.load(v + column, mask=column < dim, other=0.0)
    here = _place(table, tm, position, page_slots, page_stride, slot_stride, True) * VEC
    tl.store(k_cache + here + column, k_new, mask=(column < dim) & writes)
    tl.store(v_cache + here + column, v_new, mask=(column < dim) & writes)
    return k_new.to(tl.float32), v_new.to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "qb", "qh", "kb", "kg", "vb", "vg", "tb", "tm", "pb", "page_slots", "page_stride", "slot_stride",
        "columns", "head_dim", "heads", "splits",
    ]
)  # fmt: skip
def _paged_attention_heads(
    q, k, v, k_cache, v_cache, table, positions, rope, partial, tops, totals,
    qb: tl.int64, qh: tl.int64, kb: tl.int64, kg: tl.int64, vb: tl.int64, vg: tl.int64,
    tb: tl.int64, tm: tl.int64, pb: tl.int64,
    page_slots: tl.int64, page_stride: tl.int64, slot_stride: tl.int64, columns: tl.int64, head_dim: tl.int64,
    heads: tl.int64, splits: tl.int64, scale: tl.float32,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: one row, one head with keys of its own, one split. Products on the vector units.

    Neighbouring programs are neighbouring heads, whose pieces of a slot are neighbours in memory. Page and slot strides
    and the head dim come in units of VEC elements.

    The order of the loads is the point: the table does not wait for the position (what it holds behind the position is
    not used), and all of the split's keys and values are asked for before anything that would wait.
    """
    head, split, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + row * pb)
    first = split * SPLIT
    slot = first + tl.arange(0, SPLIT)
    slots = page_slots.to(tl.int32)
    table += row * tb
    place = _place(table, tm, slot, slots, page_stride, slot_stride, slot < columns * page_slots) * VEC
    if first <= position:
        dim = _width(head_dim, VEC, HALF, EXACT)
        k_cache += head * head_dim * VEC
        v_cache += head * head_dim * VEC
        old = slot < position
        k_tile = _old(k_cache, place, old, dim, HALF, EXACT)
        v_tile = _old(v_cache, place, old, dim, HALF, EXACT)
        angles = rope + position.to(tl.int64) * dim
        query = _turned(q + (row * qb + head * qh) * VEC, 0, 1, angles, dim, 1, HALF, EXACT)
        query = tl.reshape(query, (2 * HALF,)).to(tl.float32)
        scale *= LOG2E
        score = tl.full((), float("-inf"), tl.float32)
        v_new = tl.zeros((2 * HALF,), tl.float32)
        if position < first + SPLIT:
            k_new, v_new = _write(
                k + (row * kb + head * kg) * VEC, v + (row * vb + head * vg) * VEC, k_cache, v_cache, table, angles,
                tm, position, slots, page_stride, slot_stride, True, dim, VEC, HALF, EXACT,
            )  # fmt: skip
            score = tl.sum(query * k_new, 0) * scale
        scores = tl.where(old, tl.sum(k_tile.to(tl.float32) * query[None, :], 1) * scale, float("-inf"))
        top = tl.maximum(score, tl.max(scores, 0))
        p_new = tl.exp2(score - top)
        p = tl.exp2(scores - top)
        total = tl.sum(p, 0) + p_new
        o = tl.sum(v_tile.to(tl.float32) * p[:, None], 0) + v_new * p_new
        at = (row * heads + head) * splits + split
        column = tl.arange(0, 2 * HALF)
        tl.store(partial + at * dim + column, o, mask=column < dim)
        tl.store(tops + at, top)
        tl.store(totals + at, total)


@triton.jit(
    do_not_specialize=[
        "qb", "qh", "kb", "kg", "vb", "vg", "tb", "tm", "pb", "page_slots", "page_stride", "slot_stride",
        "head_dim", "heads", "splits", "ratio",
    ]
)  # fmt: skip
def _paged_attention_groups(
    q, k, v, k_cache, v_cache, table, positions, rope, partial, tops, totals,
    qb: tl.int64, qh: tl.int64, kb: tl.int64, kg: tl.int64, vb: tl.int64, vg: tl.int64,
    tb: tl.int64, tm: tl.int64, pb: tl.int64,
    page_slots: tl.int64, page_stride: tl.int64, slot_stride: tl.int64, head_dim: tl.int64, heads: tl.int64,
    splits: tl.int64, ratio: tl.int64, scale: tl.float32,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, QUERIES: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, up to QUERIES of the ``ratio`` heads that share a key-value head, one split. The shared
    keys are read once for all of them, so products go to the tensor cores."""
    blocks = (ratio.to(tl.int32) + QUERIES - 1) // QUERIES
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    split, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + row * pb)
    first = split * SPLIT
    if first <= position:
        dim = _width(head_dim, VEC, HALF, EXACT)
        slots = page_slots.to(tl.int32)
        table += row * tb
        k_cache += group * head_dim * VEC
        v_cache += group * head_dim * VEC
        angles = rope + position.to(tl.int64) * dim
        head = group * ratio + block * QUERIES
        queries = tl.minimum(ratio.to(tl.int32) - block * QUERIES, QUERIES)
        q_tile = _turned(
            q + (row * qb + head * qh) * VEC, qh * VEC, queries, angles, dim, QUERIES, HALF, EXACT
        )  # fmt: skip
        scale *= LOG2E
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        o = tl.zeros((QUERIES, 2 * HALF), tl.float32)
        if position < first + SPLIT:
            k_new, v_new = _write(
                k + (row * kb + group * kg) * VEC, v + (row * vb + group * vg) * VEC, k_cache, v_cache, table, angles,
                tm, position, slots, page_stride, slot_stride, block == 0, dim, VEC, HALF, EXACT,
            )  # fmt: skip
            top = tl.sum(q_tile.to(tl.float32) * k_new[None, :], 1) * scale
            total += 1.0
            o += v_new[None, :]
        end = tl.minimum(first + SPLIT, position)
        for start in range(first, end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            old = slot < end
            place = _place(table, tm, slot, slots, page_stride, slot_stride, old) * VEC
            k_tile = _old(k_cache, place, old, dim, HALF, EXACT)
            v_tile = _old(v_cache, place, old, dim, HALF, EXACT)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            scores = tl.where(old[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            o = tl.dot(p.to(v_tile.dtype), v_tile, o * shrink[:, None], input_precision="ieee")
            top = new_top
        query = tl.arange(0, QUERIES)
        column = tl.arange(0, 2 * HALF)[None, :]
        at = (row * heads + head + query) * splits + split
        tl.store(partial + at[:, None] * dim + column, o, mask=(query < queries)[:, None] & (column < dim))
        tl.store(tops + at, top, mask=query < queries)
        tl.store(totals + at, total, mask=query < queries)


@triton.jit(do_not_specialize=["pb", "head_dim", "heads", "splits"])
def _paged_attention_combine(
    partial, tops, totals, positions, out, pb: tl.int64, head_dim: tl.int64, heads: tl.int64, splits: tl.int64,
    VEC: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: one row, one head. All splits that the table has room for, SPLITS at a time, in their order.

    What the position does not reach was not written and counts nothing: it adds exact zeros, so neither the bits of a
    row nor a load depend on more than they must (the loads do not wait for the position).
    """
    head = tl.program_id(0).to(tl.int64)
    dim = _width(head_dim, VEC, HALF, EXACT)
    position = tl.load(positions + head // heads * pb)
    column = tl.arange(0, 2 * HALF)
    count = splits.to(tl.int32)
    o = tl.zeros((2 * HALF,), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, count, SPLITS):
        split = start + tl.arange(0, SPLITS)
        at = head * splits + split
        there = split < count
        part = tl.load(partial + at[:, None] * dim + column[None, :], mask=there[:, None] & (column < dim)[None, :])
        part_top, part_total = tl.load(tops + at, mask=there), tl.load(totals + at, mask=there)
        written = split * SPLIT <= position
        part_top = tl.where(written, part_top, float("-inf"))
        new_top = tl.maximum(top, tl.max(part_top, 0))
        weight, shrink = tl.exp2(part_top - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(tl.where(written, part_total, 0.0) * weight, 0)
        o = o * shrink + tl.sum(tl.where(written[:, None], part, 0.0) * weight[:, None], 0)
        top = new_top
    tl.store(out + head * dim + column, (o / total).to(out.dtype.element_ty), mask=column < dim)
