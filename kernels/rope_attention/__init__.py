"""Causal self-attention with LlamaGen's rotary embedding inside, for training and for whole sequences."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.dispatch import Implementation, Op, same_device
from retinar.kernels.philox import seed_tensor
from retinar.kernels.rope_attention import reference
from retinar.kernels.rope_attention.rope import apply_rope, check_rope, rope_table, rotate

__all__ = ["apply_rope", "check_rope", "rope_attention", "rope_table", "rotate"]

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor rope, float dropout_p, Tensor seed, float scale"
ATTENTION = Op(
    f"rope_attention({_ARGUMENTS}) -> Tensor",
    reference=reference.rope_attention,
    fake=lambda q, *_: q.new_empty(q.shape),
)
ATTENTION_BACKWARD = Op(
    f"rope_attention_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.rope_attention_backward,
    fake=lambda grad, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)


def rope_attention(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    rope_NC2: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention; q and k are rotated inside (fp32, then cast), scores and softmax are fp32.

    Args:
        q_BHND: [B, H, N, D], any strides, D even; k_BGND and v_BGND: [B, G, N, D] with G dividing H (query head h
            reads key-value head h // (H / G)); one floating dtype.
        rope_NC2: fp32 [at least N, D // 2, 2] from :func:`rope_table`.
        dropout_p: probability in [0, 1) of dropping an attention weight; kept ones are scaled by 1 / (1 - p). The mask
            comes from Philox with counter (key // 4, query, b * H + h, 1), so the backward makes it again.
        seed: 64-bit key of the mask, an int or an int64 tensor; needed when dropout_p > 0.
        scale: factor of the scores, 1 / sqrt(D) by default.
        backend: "reference"; "sdpa" (rotation, then torch's scaled_dot_product_attention; no dropout); or None.

    Returns:
        [B, H, N, D] in q's dtype, contiguous (any strides with "sdpa"). Differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, dropout without a seed, or a backend that cannot run.

    Source: LlamaGen (Sun et al. 2024); Su et al. 2021, "RoFormer".
    """
    _check(q_BHND, k_BGND, v_BGND, rope_NC2)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"rope_attention: expected dropout_p in [0, 1), found {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError("rope_attention: dropout needs a seed, so that the mask can be made again; pass seed=")
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    if backend == "sdpa" and dropout_p == 0:  # torch's own autograd serves this one, so it stays outside the op
        return _sdpa(q_BHND, k_BGND, v_BGND, rope_NC2, 0.0, None, scale)
    key = seed_tensor(0 if seed is None else seed, q_BHND.device).to(q_BHND.device)
    return ATTENTION(q_BHND, k_BGND, v_BGND, rope_NC2, float(dropout_p), key, float(scale), backend=backend)


def _sdpa(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, rope_NC2: Tensor, dropout_p: float, seed: Any, scale: float
) -> Tensor:
    q, k = apply_rope(q_BHND, rope_NC2), apply_rope(k_BGND, rope_NC2)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v_BGND, is_causal=True, scale=scale, enable_gqa=grouped)


def _sdpa_unsupported(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, dropout_p: float, *_: Any) -> str | None:
    return "torch's dropout mask is not ours and could not be made again; use dropout_p=0" if dropout_p > 0 else None


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
    ctx.save_for_backward(q, k, v, rope, seed)


def _backward(ctx: Any, grad_BHND: Tensor) -> tuple[Any, ...]:
    q, k, v, rope, seed = ctx.saved_tensors
    backend = ATTENTION_BACKWARD.own(ctx.backend)
    grads = ATTENTION_BACKWARD(grad_BHND, q, k, v, rope, ctx.dropout_p, seed, ctx.scale, backend=backend)
    return *grads, None, None, None, None


ATTENTION.register("sdpa", Implementation(_sdpa, unsupported=_sdpa_unsupported))
ATTENTION.differentiate(_backward, _save)
