"""Causal self-attention with LlamaGen's rotary embedding inside, for training and for whole sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.dispatch import Implementation, Op, same_device
from retinar.kernels.launch import flash_missing, triton_backend
from retinar.kernels.numerics import wide
from retinar.kernels.philox import seed_tensor
from retinar.kernels.rope_attention import reference
from retinar.kernels.rope_attention.reference import split_packed
from retinar.kernels.rope_attention.rope import apply_rope, check_rope, rope_table, rotate

__all__ = ["apply_rope", "check_rope", "rope_attention", "rope_table", "rotate"]

#: Backends that are whole libraries: rotation in plain torch, then their attention.
LIBRARIES = ("sdpa", "flash")
_DROPS_OTHERWISE = "its dropout mask is not ours and could not be made again; use dropout_p=0"
_INPUTS = "Tensor q, Tensor k, Tensor v"
_SETTINGS = "Tensor rope, float dropout_p, Tensor seed, float scale"


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, positions, head_dim = q.shape
    o_BHND = q.new_empty(batch, positions, heads, head_dim).transpose(1, 2)
    return o_BHND, q.new_empty(batch, heads, positions, dtype=wide(q.dtype))


ATTENTION = Op(
    f"rope_attention({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)",
    reference=reference.rope_attention,
    fake=_fake,
)
ATTENTION_BACKWARD = Op(
    f"rope_attention_backward(Tensor grad, {_INPUTS}, Tensor o, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.rope_attention_backward,
    fake=lambda grad, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)
PACKED = Op(
    f"rope_attention_packed(Tensor qkv, int heads, {_SETTINGS}) -> (Tensor, Tensor)",
    reference=reference.rope_attention_packed,
    fake=lambda qkv, heads, *_: _fake(split_packed(qkv, heads)[0]),
)
PACKED_BACKWARD = Op(
    f"rope_attention_packed_backward(Tensor grad, Tensor qkv, int heads, Tensor o, Tensor lse, {_SETTINGS}) -> Tensor",
    reference=reference.rope_attention_packed_backward,
    fake=lambda grad, qkv, *_: qkv.new_empty(qkv.shape),
)


def rope_attention(
    q_BHND: Tensor,
    k_BGND: Tensor | None,
    v_BGND: Tensor | None,
    rope_NC2: Tensor,
    *,
    heads: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention; q and k are rotated inside (fp32, then cast), scores and softmax are fp32.

    Args:
        q_BHND: [B, H, N, D], any strides, D even; k_BGND and v_BGND: [B, G, N, D] with G dividing H (query head h
            reads key-value head h // (H / G)); one floating dtype. Or, with k and v None, the packed projection
            [B, N, H + 2 G, D] of ``heads`` = H query heads: its gradient is then written in one piece, where three
            separate ones would have to be put together.
        rope_NC2: fp32 [at least N, D // 2, 2] from :func:`rope_table`.
        heads: H of the packed form, else None.
        dropout_p: probability in [0, 1) of dropping an attention weight, rounded to a 256th (at least one when it is
            not 0, at most 255); kept weights are scaled so that the expectation is exact. A byte decides, byte key % 16
            of Philox with counter (key // 16, query, b * H + h, 1), so the backward makes the mask again.
        seed: 64-bit key of the mask, an int or an int64 tensor; needed when dropout_p > 0.
        scale: positive factor of the scores, 1 / sqrt(D) by default.
        backend: "triton" (GPU; head dims that are multiples of 4 up to 128), "reference", "sdpa" (rotation, then
            torch's scaled_dot_product_attention; no dropout), "flash" (rotation, then the package flash-attn; GPU, bf16
            and fp16, no dropout), or None to choose by device.

    Returns:
        [B, H, N, D] in q's dtype, a view of [B, N, H, D] memory, so that merging the heads copies nothing (any strides
        with "sdpa"). Differentiable in q, k and v, once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, dropout without a seed, or a backend that cannot run.

    Source: LlamaGen (Sun et al. 2024); Su et al. 2021, "RoFormer".
    """
    packed = None
    if k_BGND is None or v_BGND is None:
        packed = q_BHND
        q_BHND, k_BGND, v_BGND = _split_checked(packed, heads, k_BGND is None and v_BGND is None)
    _check(q_BHND, k_BGND, v_BGND, rope_NC2)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"rope_attention: expected dropout_p in [0, 1), found {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError("rope_attention: dropout needs a seed, so that the mask can be made again; pass seed=")
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"rope_attention: expected a positive scale, found {scale}")
    if isinstance(seed, Tensor) and seed.numel() != 1:
        raise ValueError(f"rope_attention: expected one seed, found {tuple(seed.shape)}")
    device = q_BHND.device
    key = torch.zeros((), dtype=torch.int64, device=device) if seed is None else seed_tensor(seed, device).to(device)
    options = rope_NC2, float(dropout_p), key, scale
    if backend in LIBRARIES:  # they come with an autograd of their own, so they stay outside the op
        arguments = q_BHND, k_BGND, v_BGND, *options
        return ATTENTION.named(backend, q_BHND.device.type, arguments).run(*arguments)
    if packed is not None:
        return PACKED(packed, q_BHND.shape[1], *options, backend=backend)[0]
    return ATTENTION(q_BHND, k_BGND, v_BGND, *options, backend=backend)[0]


def _split_checked(qkv_BNTD: Tensor, heads: int | None, both: bool) -> tuple[Tensor, Tensor, Tensor]:
    if heads is None or not both:
        raise ValueError("rope_attention: expected q, k and v, or a packed projection with heads=: pass one of the two")
    pairs = qkv_BNTD.shape[2] - heads if qkv_BNTD.dim() == 4 else 0
    if heads < 1 or pairs < 2 or pairs % 2:
        raise ValueError(
            f"rope_attention: expected a packed projection [B, N, H + 2 G, D] with H = {heads}, found "
            f"{tuple(qkv_BNTD.shape)}"
        )
    return split_packed(qkv_BNTD, heads)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, dropout_p: float, seed: Tensor, scale: float) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


def _flash(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, dropout_p: float, seed: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    q, k = apply_rope(q, rope), apply_rope(k, rope)
    o_BNHD = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=True)
    return o_BNHD.transpose(1, 2)


def _sdpa_unsupported(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, dropout_p: float, *_: Any) -> str | None:
    return _DROPS_OTHERWISE if dropout_p > 0 else None


def _flash_unsupported(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, dropout_p: float, *_: Any) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, found {q.dtype}"
    return _DROPS_OTHERWISE if dropout_p > 0 else None


def _triton_unsupported(x: Tensor, *others: Any) -> str | None:
    head_dim = x.shape[-1]
    if any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in others):
        return "it takes a rope table in float32, found float64"
    if head_dim % 4 or head_dim > 128:
        return f"it takes head dims that are multiples of 4 up to 128, found {head_dim}"
    return None


def _check(q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, rope_NC2: Tensor) -> None:
    shapes = f"q {tuple(q_BHND.shape)}, k {tuple(k_BGND.shape)}, v {tuple(v_BGND.shape)}"
    if q_BHND.dim() != 4 or k_BGND.dim() != 4 or k_BGND.shape != v_BGND.shape:
        raise ValueError(f"rope_attention: expected q [B, H, N, D] and k, v [B, G, N, D], found {shapes}")
    batch, heads, positions, head_dim = q_BHND.shape
    groups = k_BGND.shape[1]
    if k_BGND.shape != (batch, groups, positions, head_dim) or groups == 0 or heads % groups:
        raise ValueError(
            f"rope_attention: expected k and v of q's batch, length and head dim with a head count that divides q's, "
            f"found {shapes}"
        )
    if not q_BHND.is_floating_point() or not q_BHND.dtype == k_BGND.dtype == v_BGND.dtype:
        raise ValueError(
            f"rope_attention: expected q, k and v of one floating dtype, found {q_BHND.dtype}, {k_BGND.dtype}, "
            f"{v_BGND.dtype}; cast them first"
        )
    check_rope("rope_attention", rope_NC2, positions, head_dim)
    same_device("rope_attention", q_BHND, k_BGND, v_BGND, rope_NC2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, rope, ctx.dropout_p, seed, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, rope, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_BHND: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_BHND is None:
        return (None,) * 7
    *tensors, rope, seed = ctx.saved_tensors
    backend = ATTENTION_BACKWARD.own(ctx.backend)
    grads = ATTENTION_BACKWARD(grad_BHND, *tensors, rope, ctx.dropout_p, seed, ctx.scale, backend=backend)
    return *grads, None, None, None, None


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, ctx.heads, rope, ctx.dropout_p, seed, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output, rope, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _packed_backward(ctx: Any, grad_BHND: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_BHND is None:
        return (None,) * 6
    qkv, o, lse, rope, seed = ctx.saved_tensors
    backend = PACKED_BACKWARD.own(ctx.backend)
    options = rope, ctx.dropout_p, seed, ctx.scale
    return PACKED_BACKWARD(grad_BHND, qkv, ctx.heads, o, lse, *options, backend=backend), *(None,) * 5


for op, function in (
    (ATTENTION, "rope_attention"),
    (ATTENTION_BACKWARD, "rope_attention_backward"),
    (PACKED, "rope_attention_packed"),
    (PACKED_BACKWARD, "rope_attention_packed_backward"),
):
    op.register("triton", triton_backend("rope_attention", function, unsupported=_triton_unsupported, products=True))
ATTENTION.register("sdpa", Implementation(_sdpa, unsupported=_sdpa_unsupported))
ATTENTION.register("flash", Implementation(_flash, ("cuda",), flash_missing, _flash_unsupported))
ATTENTION.differentiate(_backward, _save)
PACKED.differentiate(_packed_backward, _save_packed)
