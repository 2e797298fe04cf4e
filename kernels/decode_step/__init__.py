"""One token for every live row: all layers, logits and sampling in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.decode_step import reference
from retinar.kernels.decode_step.types import DecodeWeights, StepInputs
from retinar.kernels.dispatch import Op, refuse_gradients, same_device
from retinar.kernels.paged_attention import check_cache, check_table
from retinar.kernels.rope_attention.rope import check_rope

__all__ = ["DecodeWeights", "StepInputs", "decode_step"]

_LISTS = ("attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2")
_SCALARS = {"n_head": "int", "n_kv_head": "int", "eps": "float"}
_WEIGHTS = ", ".join(
    f"{'Tensor[]' if name in _LISTS else _SCALARS.get(name, 'Tensor')} {name}" for name in DecodeWeights._fields
)
_INPUTS = ", ".join(f"Tensor {name}" for name in StepInputs._fields)


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    weights, (k_cache, v_cache), inputs = _unflatten(args)
    return reference.decode_step(weights, k_cache, v_cache, inputs)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    weights, (k_cache, _), inputs = _unflatten(args)
    codes_I = k_cache.new_empty(inputs.cond_row_I.shape, dtype=torch.int64)
    return codes_I, k_cache.new_empty(inputs.tokens_B.shape[0], weights.output_VD.shape[0], dtype=torch.float32)


def _unflatten(args: tuple[Any, ...]) -> tuple[DecodeWeights, tuple[Tensor, Tensor], StepInputs]:
    count = len(DecodeWeights._fields)
    return DecodeWeights(*args[:count]), (args[count], args[count + 1]), StepInputs(*args[count + 2 :])


STEP = Op(
    f"decode_step({_WEIGHTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, {_INPUTS}) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)


def decode_step(
    weights: DecodeWeights,
    k_cache_LPSGD: Tensor,
    v_cache_LPSGD: Tensor,
    inputs: StepInputs,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advances every live row by one token and draws one code for each image.

    Args:
        weights: see :class:`DecodeWeights`.
        k_cache_LPSGD, v_cache_LPSGD: [layers, P, S, G, D] in the weights' dtype, contiguous; the rows' new keys and
            values are written into their pages (the one mutation).
        inputs: see :class:`StepInputs`; B >= 1 rows, I >= 0 images.
        backend: "reference", or None to choose by device.

    Returns:
        (codes int64 [I], logits fp32 [B, V]). Both depend, bit by bit, on a row's (an image's) own data alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run. Tokens, positions, rows and
            page numbers are trusted.
    """
    layers, dtype = len(weights.wqkv), weights.output_VD.dtype
    head_dim = k_cache_LPSGD.shape[-1] if k_cache_LPSGD.dim() == 5 else -1
    if head_dim < 0 or k_cache_LPSGD.shape[0] != layers:
        raise ValueError(
            f"decode_step: expected caches [{layers}, pages, slots, kv heads, head dim], found "
            f"{tuple(k_cache_LPSGD.shape)}"
        )
    width, rows = weights.tok_embedding_VD.shape[1], (weights.n_head + 2 * weights.n_kv_head) * head_dim
    if any(tuple(w.shape) != (rows, width) for w in weights.wqkv) or weights.n_head % weights.n_kv_head:
        raise ValueError(
            f"decode_step: expected every wqkv as [{rows}, {width}] for {weights.n_head} heads and "
            f"{weights.n_kv_head} kv heads of {head_dim}, found {[tuple(w.shape) for w in weights.wqkv]}"
        )
    check_cache("decode_step", k_cache_LPSGD, v_cache_LPSGD, (weights.n_kv_head, head_dim), dtype)
    check_table("decode_step", inputs.block_table_BM, inputs.positions_B, inputs.tokens_B.shape[0])
    check_rope("decode_step", weights.rope_NC2, 1, head_dim)
    same_device("decode_step", weights.output_VD, k_cache_LPSGD, v_cache_LPSGD, *inputs)
    refuse_gradients("decode_step", weights.output_VD, weights.tok_embedding_VD, *weights.wqkv)
    return STEP(*weights, k_cache_LPSGD, v_cache_LPSGD, *inputs, backend=backend)
