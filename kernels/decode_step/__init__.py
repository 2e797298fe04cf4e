"""One token for every live row: all layers, logits and sampling in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.decode_step import reference
from retinar.kernels.decode_step.checks import check
from retinar.kernels.decode_step.native import NativeDecoder, huge_pages
from retinar.kernels.decode_step.types import DecodeWeights, StepInputs, flatten, unflatten
from retinar.kernels.dispatch import Op
from retinar.kernels.launch import triton_backend
from retinar.kernels.numerics import wide
from retinar.kernels.paged_attention import triton_refusal

__all__ = ["DecodeWeights", "NativeDecoder", "StepInputs", "decode_step", "huge_pages"]

_LISTS = ("attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2")
_SCALARS = {"n_head": "int", "n_kv_head": "int", "eps": "float"}
_WEIGHTS = ", ".join(
    f"{'Tensor[]' if name in _LISTS else _SCALARS.get(name, 'Tensor')} {name}" for name in DecodeWeights._fields
)
_INPUTS = ", ".join(f"Tensor {name}" for name in StepInputs._fields)


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    weights, (k_cache, v_cache), inputs = unflatten(args)
    return reference.decode_step(weights, k_cache, v_cache, inputs)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    weights, (k_cache, _), inputs = unflatten(args)
    codes_I = k_cache.new_empty(inputs.cond_row_I.shape, dtype=torch.int64)
    shape = inputs.tokens_B.shape[0], weights.output_VD.shape[0]
    return codes_I, k_cache.new_empty(shape, dtype=wide(k_cache.dtype))


def _triton_unsupported(*args: Any) -> str | None:
    _, caches, inputs = unflatten(args)
    layers = (cache[layer] for cache in caches for layer in range(min(2, len(cache))))
    return triton_refusal(inputs.tokens_B.shape[0], caches[0].shape[-1], *layers)


STEP = Op(
    f"decode_step({_WEIGHTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, {_INPUTS}) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
STEP.register("triton", triton_backend("decode_step", "decode_step", products=True, unsupported=_triton_unsupported))
STEP.register("blas", triton_backend("decode_step", "decode_step_blas", products=True, unsupported=_triton_unsupported))


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
        backend: "triton" (GPU; fp32, bf16, fp16; head dims that are multiples of 4 up to 128), "blas" (the same with
            torch's matrix products, for many rows), "reference", or None to choose by device.

    Returns:
        (codes int64 [I], logits fp32 [B, V]). Both depend, bit by bit, on a row's (an image's) own data alone; with
        "blas" on how many rows there are too, since a library picks its product by that. "triton" and "blas" do not
        wait for the GPU and may be captured in a CUDA graph.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, weights that ask for gradients, or a backend that cannot
            run. Tokens, positions, rows and page numbers are trusted.
    """
    check(weights, k_cache_LPSGD, v_cache_LPSGD, inputs)
    return STEP(*flatten(weights, (k_cache_LPSGD, v_cache_LPSGD), inputs), backend=backend)
