"""What top-k and top-p keep of a row, found by bisection without a sort: the device functions of `gpu.py`.

Logits are compared by `key_of`, integers in their order: 32 halvings find any of them, and a step is one sum over the
vocabulary. Up to the widest block a program keeps its row in registers meanwhile; above, it reads the row again in
every step. Masses are integers too, so their sums are exact and depend on no order, block or number of warps.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

#: Keys of NaN, of infinities, and of places past the last code.
NAN, INFINITE, OUTSIDE = tl.constexpr(2**31 - 1), tl.constexpr(0x7F800000), tl.constexpr(-(2**31))
#: The mass of the largest logit of a row. 2^14 codes round off less than 2^-18 of it together.
UNIT = tl.constexpr(2.0**31)


@triton.jit
def key_of(x):
    """int32 in the order of fp32 numbers: both zeros are 0, NaN is above infinity."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN, tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits))


@triton.jit
def _value(key):
    """The number of a key."""
    size = tl.abs(key).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -size, size)


@triton.jit
def guided(c, u, scale):
    """u + (c - u) * scale with every step rounded, as in torch: a multiply-add would break and make ties. The product
    is a multiply-add of its own, for a plain one would be contracted with the sum."""
    return u + tl.fma(c - u, scale, 0.0)


@triton.jit
def _scaled(row, code, vocabulary):
    """Logits of codes, guided and over the temperature. ``row``: (conditional, null, is guided, scale, temperature)."""
    inside = code < vocabulary
    c = tl.load(row[0] + code, mask=inside, other=0.0)
    u = tl.load(row[1] + code, mask=inside & row[2], other=0.0)
    return tl.div_rn(tl.where(row[2], guided(c, u, row[3]), c), row[4])


@triton.jit
def _keys(row, start, vocabulary, BLOCK: tl.constexpr):
    code = start + tl.arange(0, BLOCK)
    return tl.where(code < vocabulary, key_of(_scaled(row, code, vocabulary)), OUTSIDE)


@triton.jit
def _masses(keys, least, peak):
    """uint32: exp(logit - peak) in units of 2^-31, 0 below a key; the peak is the largest logit and finite."""
    mass = tl.exp(_value(keys) - peak) * UNIT + 0.5
    return tl.where(keys >= least, mass, 0.0).to(tl.uint32)


# Sums over the vocabulary: of the tile at hand, or, with LOOP, of the row read anew block by block.


@triton.jit
def _highest(tile, row, vocabulary, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    highest = tl.max(tile, 0)
    if LOOP:
        for start in range(BLOCK, vocabulary, BLOCK):
            highest = tl.maximum(highest, tl.max(_keys(row, start, vocabulary, BLOCK), 0))
    return highest


@triton.jit
def _count(tile, least, row, vocabulary, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    """How many codes have at least a key."""
    count = tl.sum((tile >= least).to(tl.int32), 0)
    if LOOP:
        for start in range(BLOCK, vocabulary, BLOCK):
            count += tl.sum((_keys(row, start, vocabulary, BLOCK) >= least).to(tl.int32), 0)
    return count


@triton.jit
def _count_ties(tile, key, end, row, vocabulary, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    """How many codes before ``end`` have exactly a key."""
    count = tl.sum(((tile == key) & (tl.arange(0, BLOCK) < end)).to(tl.int32), 0)
    if LOOP:
        for start in range(BLOCK, end, BLOCK):
            tied = (_keys(row, start, vocabulary, BLOCK) == key) & (start + tl.arange(0, BLOCK) < end)
            count += tl.sum(tied.to(tl.int32), 0)
    return count


@triton.jit
def _mass_above(tile, masses, key, least, peak, row, vocabulary, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the codes above a key."""
    key = key.to(tl.int32)
    mass = tl.sum(tl.where(tile > key, masses, 0).to(tl.int64), 0)
    if LOOP:
        for start in range(BLOCK, vocabulary, BLOCK):
            keys = _keys(row, start, vocabulary, BLOCK)
            mass += tl.sum(tl.where(keys > key, _masses(keys, least, peak), 0).to(tl.int64), 0)
    return mass


@triton.jit
def _kth(tile, k, row, vocabulary, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    """A key that the k largest reach, and those that tie with the k-th, and no other; 0 < k < vocabulary."""
    low = tl.full((), -INFINITE, tl.int64)  # k or more reach it
    high = tl.full((), NAN + 1, tl.int64)  # fewer do
    while high - low > 1:
        middle = low + (high - low) // 2
        count = _count(tile, middle.to(tl.int32), row, vocabulary, LOOP, BLOCK)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count < k, middle, middle + 1))  # exactly k: done
    return low.to(tl.int32)


@triton.jit
def _nucleus(tile, least, p, row, vocabulary, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    """(key, end): a code stays where it is above the key, or at it and before ``end``; p < 1, codes below ``least``
    are gone.

    The key is the lowest with a mass above it of at most p; it is some code's. Codes at it come in their order, each
    with the same mass, so division says how many stay.
    """
    key, end = least, vocabulary
    highest = _highest(tile, row, vocabulary, LOOP, BLOCK)
    if tl.abs(highest) < INFINITE:  # else every probability of the reference is NaN, and it drops nothing
        peak = _value(highest)
        masses = _masses(tile, least, peak)
        low = least.to(tl.int64) - 1
        high = highest.to(tl.int64)
        total = _mass_above(tile, masses, low, least, peak, row, vocabulary, LOOP, BLOCK)
        above = tl.zeros((), tl.int64)
        reached = total  # the mass above ``low``: more than the limit, as that above ``high`` is not
        limit = (total.to(tl.float64) * tl.maximum(p, 0.0).to(tl.float64)).to(tl.int64)
        while high - low > 1:
            middle = low + (high - low) // 2
            mass = _mass_above(tile, masses, middle, least, peak, row, vocabulary, LOOP, BLOCK)
            fits = mass <= limit
            high, above = tl.where(fits, middle, high), tl.where(fits, mass, above)
            low, reached = tl.where(fits, low, middle), tl.where(fits, reached, mass)
        key = high.to(tl.int32)
        ties = _count_ties(tile, key, vocabulary, row, vocabulary, LOOP, BLOCK)
        stay = (limit - above) // ((reached - above) // ties) + 1
        if stay < ties:
            first = tl.zeros((), tl.int32)  # the end is above it
            while end - first > 1:
                middle = first + (end - first) // 2
                enough = _count_ties(tile, key, middle, row, vocabulary, LOOP, BLOCK) >= stay
                end, first = tl.where(enough, middle, end), tl.where(enough, first, middle)
    return key, end


@triton.jit
def bounds(row, k, p, vocabulary, LOOP: tl.constexpr, BLOCK: tl.constexpr):
    """(key, end) of what top-k and top-p keep, as in `_nucleus`."""
    key, end = tl.full((), -INFINITE, tl.int32), vocabulary
    some = (k > 0) & (k < vocabulary)
    if some | (p < 1):
        tile = _keys(row, 0, vocabulary, BLOCK)
        if some:
            key = _kth(tile, k, row, vocabulary, LOOP, BLOCK)
        if p < 1:
            key, end = _nucleus(tile, key, p, row, vocabulary, LOOP, BLOCK)
    return key, end


@triton.jit
def filtered(row, code, key, end, vocabulary):
    """Scaled logits, -inf where dropped and past the last code."""
    x = _scaled(row, code, vocabulary)
    keys = key_of(x)
    kept = (code < vocabulary) & ((keys > key) | ((keys == key) & (code < end)))
    return tl.where(kept, x, float("-inf"))
