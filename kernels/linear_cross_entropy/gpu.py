"""linear_cross_entropy on a GPU: cuBLAS makes a chunk's logits and the gradients' products, Triton all in between.

One pass over the chunks; a chunk's logits are read twice (the second time mostly from cache) and overwritten by what
the next two products need. Nothing waits for the device: the number of kept targets stays there.
"""

# Kernel functions take pointers and tiles, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, aligned, architecture
from retinar.kernels.linear_cross_entropy import reference

IGNORED = tl.constexpr(reference.IGNORED)
#: Gradients of fp16 logits leave the kernel 2^14 times as large: 1/16384, a usual probability, is fp16's least normal.
HALF_SCALE = tl.constexpr(2.0**14)
BLOCK = 4096
# 16 warps a row: three rows on a multiprocessor, at V = 16384 26 MB of logits on 132 of them, so that the second pass
# finds them in the L2 (50 MB on an H100, 40 on an A100). Twice as many rows with half the warps would not fit.
WARPS = 16
VECTOR = 8  # elements of 16 bytes in the narrow dtypes: rows of the buffers are padded to it


@triton.jit(do_not_specialize=["count"])
def _linear_cross_entropy_count(targets, each, count: tl.int64, BLOCK: tl.constexpr):
    """One program: ``each`` = 1 / number of targets that count."""
    kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        target = tl.load(targets + place, mask=place < count, other=IGNORED)
        kept += (target != IGNORED).to(tl.int32)
    tl.store(each, tl.div_rn(1.0, tl.sum(kept.to(tl.int64), 0).to(tl.float32)))


@triton.jit(do_not_specialize=["first", "vocabulary", "groups"])
def _linear_cross_entropy_rows(
    logits, targets, each, losses, grads, first: tl.int64, vocabulary: tl.int64, groups: tl.int64,
    GRADIENTS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: one row of a chunk whose first row is row ``first`` of the targets.

    Rows lie groups * VEC elements apart, in ``grads`` too. ``grads`` may be ``logits``: the block that is stored is
    the one that was just loaded, and the first pass is over by then.
    """
    row = tl.program_id(0).to(tl.int64)
    width = groups * VEC
    logits += row * width
    target = tl.load(targets + first + row)
    kept = target != IGNORED
    # A target outside the vocabulary has no logit: its loss is NaN, not a number read elsewhere.
    chosen = tl.load(logits + target, mask=(target >= 0) & (target < vocabulary), other=float("nan"))
    high = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # The load is masked by the padded width, whose factor VEC keeps it 16 bytes wide; the padding is anything.
        x = tl.load(logits + column, mask=column < width, other=0.0)
        x = tl.where(column < vocabulary, x, float("-inf"))
        higher = tl.maximum(high, tl.max(x, 0))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(x - higher), 0)
        high = higher
    tl.store(losses + first + row, tl.where(kept, (high - chosen) + tl.log(total), 0.0))
    if GRADIENTS:
        factor = tl.load(each)
        if grads.dtype.element_ty == tl.float16:
            factor = HALF_SCALE
        factor = tl.where(kept, factor, factor * 0.0)  # NaN when nothing is kept: 0 * inf, as in the reference
        grads += row * width
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < width, other=0.0)
            x = tl.where(column < vocabulary, x, float("-inf"))
            y = tl.exp(x - high) * (factor / total) - tl.where(column == target, factor, 0.0)
            tl.store(grads + column, y.to(grads.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["count"])
def _linear_cross_entropy_mean(losses, each, loss, count: tl.int64, BLOCK: tl.constexpr):
    """One program, so the order of the sum is fixed: BLOCK running sums, then their tree."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(losses + place, mask=place < count, other=0.0)
    tl.store(loss, tl.sum(total, 0) * tl.load(each))


@triton.jit(do_not_specialize=["groups", "constant"])
def _linear_cross_entropy_scale(
    gradient, factor, out, groups: tl.int64, constant: tl.float32, VEC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK elements of ``gradient * factor * constant``; ``out`` may be ``gradient``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < groups * VEC
    y = tl.load(gradient + place, mask=inside) * (tl.load(factor) * constant)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def rows_variant(dtype: torch.dtype, gradients: bool, architecture: int) -> Variant:
    """Of the kernel over a chunk's rows; ``dtype`` is hidden's, and no matter without gradients."""
    pointers = ("fp32", "i64", "fp32", "fp32", TYPES[dtype] if gradients else "fp32")
    return Variant(architecture, pointers, (("GRADIENTS", gradients), ("VEC", VECTOR), ("BLOCK", BLOCK)), WARPS)


def scale_variant(dtype: torch.dtype, count: int, architecture: int) -> Variant:
    """Of the kernel that scales so many elements into ``dtype``."""
    vec = VECTOR if count % VECTOR == 0 else 1
    return Variant(architecture, ("fp32", "fp32", TYPES[dtype]), (("VEC", vec), ("BLOCK", 1024)), 4)


def _rows_table(architecture: int) -> Iterator[Variant]:
    return (rows_variant(dtype, gradients, architecture) for dtype in FLOATS for gradients in (False, True))


def _scale_table(architecture: int) -> Iterator[Variant]:
    return (scale_variant(dtype, count, architecture) for dtype in FLOATS for count in (1, VECTOR))


def _whole(*pointers: str) -> Callable[[int], list[Variant]]:
    """The table of a kernel with one variant, which one program runs."""
    return lambda architecture: [Variant(architecture, pointers, (("BLOCK", BLOCK),), WARPS)]


COUNT = Kernel("linear_cross_entropy", _linear_cross_entropy_count, _whole("i64", "fp32"))
ROWS = Kernel("linear_cross_entropy", _linear_cross_entropy_rows, _rows_table)
MEAN = Kernel("linear_cross_entropy", _linear_cross_entropy_mean, _whole("fp32", "fp32", "fp32"))
SCALE = Kernel("linear_cross_entropy", _linear_cross_entropy_scale, _scale_table)
KERNELS = (COUNT, ROWS, MEAN, SCALE)


def chunk_rows(tokens: int) -> int:
    """Rows of a chunk: an eighth of them, but 2,048 to 4,096 (fewer leave the products too thin, more only take
    memory), in chunks of equal size and a multiple of VECTOR, so that every chunk starts at a multiple of 16 bytes."""
    most = min(max(tokens // 8, 2048), 4096)
    chunks = max(1, triton.cdiv(tokens, most))
    return max(1, triton.cdiv(triton.cdiv(tokens, chunks), VECTOR)) * VECTOR


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and with ``gradients`` those of hidden and weight in fp32 for a loss gradient of one (else two empty ones).

    Args:
        hidden: [T, D].
        weight: [V, D] in hidden's dtype.
        targets: int64 [T].
        gradients: whether to make them.
        rows: of a chunk; None for `chunk_rows`.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    hidden, weight, targets = _rowwise(hidden), _rowwise(weight), aligned(targets.contiguous())
    loss, each = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    COUNT.launch((1,), (targets, each, tokens), {"BLOCK": BLOCK}, WARPS)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    grad_hidden, grad_weight = (
        x.new_empty(x.shape if gradients else 0, dtype=torch.float32) for x in (hidden, weight)
    )  # fmt: skip
    if gradients and tokens == 0:
        grad_weight.zero_()
    rows = min(rows or chunk_rows(tokens), max(tokens, 1))
    groups = triton.cdiv(vocabulary, VECTOR)
    variant = rows_variant(hidden.dtype, gradients, architecture(hidden.device) or 0)
    logits = hidden.new_empty(rows, groups * VECTOR, dtype=torch.float32)
    # fp32 gradients take the logits' own place.
    grads = logits if not gradients or hidden.dtype == torch.float32 else torch.empty_like(logits, dtype=hidden.dtype)
    for first in range(0, tokens, rows):
        part = hidden[first : first + rows]
        count = part.shape[0]
        _product(part, weight.t(), logits[:count, :vocabulary])
        arguments = logits, targets, each, losses, grads, first, vocabulary, groups
        ROWS.launch((count,), arguments, dict(variant.constants), variant.num_warps)
        if gradients:
            grad_logits = grads[:count, :vocabulary]
            _product(grad_logits, weight, grad_hidden[first : first + rows])
            _product(grad_logits.t(), part, grad_weight, add=first > 0)
    MEAN.launch((1,), (losses, each, loss, tokens), {"BLOCK": BLOCK}, WARPS)
    if gradients and hidden.dtype == torch.float16:
        for gradient in (grad_hidden, grad_weight):
            _scale(gradient, each, gradient, 1 / HALF_SCALE.value)
    return loss, grad_hidden, grad_weight


def linear_cross_entropy_backward(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * grad_loss`` in ``dtype``, rounded once."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    _scale(aligned(gradient.contiguous()), aligned(grad_loss), out, 1.0)
    return out


def _scale(gradient: Tensor, factor: Tensor, out: Tensor, constant: float) -> None:
    count = gradient.numel()
    if count:
        variant = scale_variant(out.dtype, count, architecture(out.device) or 0)
        constants = dict(variant.constants)
        arguments = gradient, factor, out, count // constants["VEC"], constant
        SCALE.launch((triton.cdiv(count, constants["BLOCK"]),), arguments, constants, variant.num_warps)


def _rowwise(x: Tensor) -> Tensor:
    """The matrix with rows that BLAS can walk, copied once rather than in every chunk where it has none."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out (+)= a b`` in fp32: factors in their own dtype, products summed and kept in fp32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # out is its own summand: nothing is copied
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)
