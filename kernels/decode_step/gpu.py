"""The decode step on a GPU: one small kernel in front, then other ops' launchers. Nothing here waits for the GPU.

Nothing looks at what a tensor holds either, and what is made once a step is made before the first layer, so a CUDA
graph that has captured a step replays it with whatever its inputs hold by then.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.cfg_sample.gpu import cfg_sample
from retinar.kernels.decode_step import blas
from retinar.kernels.decode_step.compose import Linear, compose
from retinar.kernels.decode_step.types import DecodeWeights, StepInputs, unflatten
from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, aligned, architecture
from retinar.kernels.linear.gpu import linear
from retinar.kernels.paged_attention.gpu import paged_attention
from retinar.kernels.rows import as_rows, vector, whole_vectors


@triton.jit(do_not_specialize=["rows", "images", "width", "class_stride", "code_stride"])
def _decode_step_begin(
    tokens, positions, cond_row, classes, codes, x, image_positions,
    rows: tl.int64, images: tl.int64, width: tl.int64, class_stride: tl.int64, code_stride: tl.int64,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of a row's embedding; those of the first block also find an image's position each.

    ``width`` and strides come in units of VEC elements. Of the two loads, one has no lane: the class's at position 0,
    the code's elsewhere.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if (block == 0) & (row < images):
        tl.store(image_positions + row, tl.load(positions + tl.load(cond_row + row)))
    if row < rows:
        first = tl.load(positions + row) == 0
        token = tl.load(tokens + row)
        column = tl.arange(0, BLOCK)
        start = block * BLOCK
        inside = column < tl.minimum(width - block * (BLOCK // VEC), BLOCK // VEC).to(tl.int32) * VEC
        as_class = tl.load(classes + token * (class_stride * VEC) + start + column, mask=inside & first)
        as_code = tl.load(codes + token * (code_stride * VEC) + start + column, mask=inside & (first == 0))
        tl.store(x + row * (width * VEC) + start + column, tl.where(first, as_class, as_code), mask=inside)


#: Elements of a program; a thread has one vector.
BLOCK = 512


def begin_variant(arch: int, dtype: torch.dtype, vectors: bool) -> Variant:
    """``vectors``: the rows of both tables are whole vectors of 16 bytes."""
    pointers = ("i64", "i32", "i32", *(TYPES[dtype],) * 3, "i32")
    constants = ("VEC", vector(dtype) if vectors else 1), ("BLOCK", BLOCK)
    return Variant(arch, pointers, constants, BLOCK // vector(dtype) // 32)


def _begin_table(arch: int) -> Iterator[Variant]:
    return (begin_variant(arch, dtype, vectors) for dtype in FLOATS for vectors in (False, True))


BEGIN = Kernel("decode_step", _decode_step_begin, _begin_table)
KERNELS = (BEGIN,)


class Begun(NamedTuple):
    """Embeddings of the rows [B, E], and the positions of the images' conditional rows int32 [I]."""

    x_BE: Tensor
    position_I: Tensor


def begin(weights: DecodeWeights, inputs: StepInputs) -> Begun:
    """The class's row at position 0, the code's row elsewhere; and the images' positions, in the same launch."""
    classes_CE, codes_VE = as_rows(weights.cls_embedding_CD), as_rows(weights.tok_embedding_VD)
    rows, images, width = inputs.tokens_B.shape[0], inputs.cond_row_I.shape[0], codes_VE.shape[1]
    x_BE = codes_VE.new_empty(rows, width)
    position_I = inputs.positions_B.new_empty(images)
    strides = classes_CE.stride(0), codes_VE.stride(0)
    vectors = whole_vectors(width, *strides, dtype=x_BE.dtype)
    variant = begin_variant(architecture(x_BE.device) or 0, x_BE.dtype, vectors)
    constants = dict(variant.constants)
    units = (each // constants["VEC"] for each in (width, *strides))
    tensors = inputs.tokens_B, inputs.positions_B, inputs.cond_row_I, classes_CE, codes_VE, x_BE, position_I
    grid = max(rows, images), triton.cdiv(width, BLOCK)
    BEGIN.launch(grid, (*tensors, rows, images, *units), constants, variant.num_warps)
    return Begun(x_BE, position_I)


def decode_step(*args: Any) -> tuple[Tensor, Tensor]:
    """(codes int64 [I], logits fp32 [B, V]) with products whose bits, row by row, depend on the row alone."""
    return _step(args, linear)


def decode_step_blas(*args: Any) -> tuple[Tensor, Tensor]:
    """The same with torch's products."""
    return _step(args, blas.linear)


def _step(args: tuple[Any, ...], product: Linear) -> tuple[Tensor, Tensor]:
    weights, caches_LPSGD, inputs = unflatten(args)
    # Copied here where they must be, once a step: what the layers and the sampler share they find as they want it.
    inputs = StepInputs(*(aligned(each.contiguous()) for each in inputs))
    rope_NC2 = aligned(weights.rope_NC2.contiguous())
    scale = caches_LPSGD[0].shape[-1] ** -0.5

    def attention(q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return paged_attention(
            q_BHD, k_BGD, v_BGD, k_cache, v_cache, inputs.block_table_BM, inputs.positions_B, rope_NC2, scale
        )

    begun = begin(weights, inputs)
    logits_BV = compose(weights, caches_LPSGD, begun.x_BE, product, attention)
    cond_row, null_row, *parameters = inputs[3:]
    return cfg_sample(logits_BV, cond_row, null_row, *parameters, begun.position_I), logits_BV
