"""What a decode step refuses at the door: kernels behind it trust shapes and dtypes, and would read past their ends."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.decode_step.types import DecodeWeights, StepInputs
from retinar.kernels.dispatch import refuse_gradients, same_device
from retinar.kernels.numerics import wide
from retinar.kernels.paged_attention import check_cache, check_table
from retinar.kernels.rope_attention.rope import check_rope

#: None: fp32 (fp64 beside weights in fp64, for tests).
_IMAGES = {
    "cond_row_I": torch.int32,
    "null_row_I": torch.int32,
    "cfg_scale_I": None,
    "temperature_I": None,
    "top_k_I": torch.int32,
    "top_p_I": None,
    "seed_I": torch.int64,
    "index_I": torch.int64,
}


def check(weights: DecodeWeights, k_cache_LPSGD: Tensor, v_cache_LPSGD: Tensor, inputs: StepInputs) -> None:
    """ValueError for the first thing that does not fit; what the tensors hold is trusted."""
    layers, dtype = len(weights.wqkv), weights.output_VD.dtype
    head_dim = k_cache_LPSGD.shape[-1] if k_cache_LPSGD.dim() == 5 else -1
    if head_dim < 0 or k_cache_LPSGD.shape[0] != layers:
        raise ValueError(
            f"decode_step: expected caches [{layers}, pages, slots, kv heads, head dim], found "
            f"{tuple(k_cache_LPSGD.shape)}"
        )
    check_weights(weights, head_dim)
    check_cache("decode_step", k_cache_LPSGD, v_cache_LPSGD, (weights.n_kv_head, head_dim), dtype)
    check_inputs(inputs, wide(dtype))
    check_rope("decode_step", weights.rope_NC2, 1, head_dim)
    fields = [each for each in weights if not isinstance(each, int | float)]
    tensors = [tensor for each in fields for tensor in (each if isinstance(each, list) else [each])]
    same_device("decode_step", *tensors, k_cache_LPSGD, v_cache_LPSGD, *inputs)
    refuse_gradients("decode_step", *tensors)


def check_weights(weights: DecodeWeights, head_dim: int) -> None:
    """ValueError unless all weights have the shapes and the one dtype of a model with heads so wide."""
    heads, groups, dtype = weights.n_head, weights.n_kv_head, weights.output_VD.dtype
    codes, width = weights.tok_embedding_VD.shape if weights.tok_embedding_VD.dim() == 2 else (-1, -1)
    hidden = weights.w2[0].shape[-1] if weights.w2 else 0
    rows = (heads + 2 * groups) * head_dim
    if any(tuple(w.shape) != (rows, width) for w in weights.wqkv) or groups < 1 or heads % groups:
        raise ValueError(
            f"decode_step: expected every wqkv as [{rows}, {width}] for {heads} heads and {groups} kv heads of "
            f"{head_dim}, found {[tuple(w.shape) for w in weights.wqkv]}"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding_CD": (*weights.cls_embedding_CD.shape[:1], width),
        "attention_norm": (width,),
        "wqkv": (rows, width),
        "wo": (width, heads * head_dim),
        "ffn_norm": (width,),
        "w13": (2 * hidden, width),
        "w2": (width, hidden),
        "norm_D": (width,),
        "output_VD": (codes, width),
        "tok_embedding_VD": (codes, width),
    }
    for name, shape in shapes.items():
        found = getattr(weights, name)
        found = found if isinstance(found, list) else [found]
        if any(each.shape != shape or each.dtype != dtype for each in found) or not dtype.is_floating_point:
            raise ValueError(
                f"decode_step: expected {name} as {list(shape)} in one floating dtype, output_VD's {dtype}, found "
                f"{sorted({f'{each.dtype} {list(each.shape)}' for each in found})}"
            )
    lengths = {name: len(each) for name, each in weights._asdict().items() if isinstance(each, list)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"decode_step: expected one weight a layer in every list, found {lengths}")


def check_inputs(inputs: StepInputs, floats: torch.dtype) -> None:
    rows, images = inputs.tokens_B.shape[0] if inputs.tokens_B.dim() == 1 else 0, inputs.cond_row_I.numel()
    if rows < 1 or inputs.tokens_B.dtype != torch.int64:
        raise ValueError(
            f"decode_step: expected int64 tokens [rows >= 1], found {inputs.tokens_B.dtype} "
            f"{tuple(inputs.tokens_B.shape)}"
        )
    check_table("decode_step", inputs.block_table_BM, inputs.positions_B, rows)
    for name, dtype in _IMAGES.items():
        found: Tensor = getattr(inputs, name)
        if found.shape != (images,) or found.dtype != (dtype or floats):
            raise ValueError(
                f"decode_step: expected {name} as {dtype or floats} [{images}], as cond_row_I says, found "
                f"{found.dtype} {tuple(found.shape)}"
            )
