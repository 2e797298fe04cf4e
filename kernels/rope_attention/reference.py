"""Causal attention with the rotary embedding applied to q and k: rotation in fp32 and cast, everything after in fp32.

Heads are computed one batch item at a time, so that the N x N scores of a whole batch never exist together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.numerics import wide
from retinar.kernels.philox.reference import DOMAIN_ATTENTION, philox4x32
from retinar.kernels.rope_attention.rope import rotate, rotate_back


def rope_attention(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, rope_NC2: Tensor, dropout_p: float, seed: Tensor, scale: float
) -> Tensor:
    o_BHND = q_BHND.new_empty(q_BHND.shape)
    for b, (q_HND, k_GND, v_GND) in enumerate(zip(q_BHND, k_BGND, v_BGND, strict=True)):
        _, _, probabilities_HNN, mask_HNN = _probabilities(q_HND, k_GND, rope_NC2, dropout_p, seed, scale, b)
        v_HND = _widen_heads(v_GND, q_HND.shape[0])
        o_BHND[b] = (probabilities_HNN * mask_HNN) @ v_HND
    return o_BHND


def rope_attention_backward(
    grad_BHND: Tensor,
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    rope_NC2: Tensor,
    dropout_p: float,
    seed: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; scores and the dropout mask are made again. The derivation is in README.md."""
    heads, groups = q_BHND.shape[1], k_BGND.shape[1]
    rope = rope_NC2[: q_BHND.shape[2]]
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q_BHND, k_BGND, v_BGND))
    for b, (grad_o, q_HND, k_GND, v_GND) in enumerate(zip(grad_BHND, q_BHND, k_BGND, v_BGND, strict=True)):
        q, k, p, mask = _probabilities(q_HND, k_GND, rope_NC2, dropout_p, seed, scale, b)
        v, grad_o = _widen_heads(v_GND, heads), grad_o.to(wide(grad_o.dtype))
        grad_p = (grad_o @ v.mT) * mask
        grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * scale
        grad_q[b] = rotate_back(grad_scores @ k, rope)
        grad_k[b] = rotate_back((grad_scores.mT @ q).unflatten(0, (groups, -1)).sum(1), rope)
        grad_v[b] = ((p * mask).mT @ grad_o).unflatten(0, (groups, -1)).sum(1)
    return grad_q, grad_k, grad_v


def dropout_mask(seed: Tensor, batch_item: int, heads: int, positions: int, dropout_p: float) -> Tensor:
    """fp32 [H, N, N]: 0 where dropped, 1 / (1 - p) where kept; word for (query, key) of head bh = b * H + h is
    philox(counter = (key // 4, query, bh, domain), key = seed)[key % 4], kept when word >= p * 2^32."""
    device = seed.device
    head = (batch_item * heads + torch.arange(heads, device=device))[:, None, None]
    query = torch.arange(positions, device=device)[None, :, None]
    quad = torch.arange(-(-positions // 4), device=device)[None, None, :]
    mask = torch.empty(heads, positions, positions, device=device)
    for h in range(heads):  # one head at a time: the words of all heads together would need gigabytes for GPT-XL
        words = philox4x32((quad, query, head[h : h + 1], torch.full_like(head[h : h + 1], DOMAIN_ATTENTION)), seed)
        kept = torch.stack(words, -1).flatten(-2)[0, :, :positions] >= int(dropout_p * 2**32)
        torch.mul(kept, 1 / (1 - dropout_p), out=mask[h])
    return mask


def _probabilities(
    q_HND: Tensor, k_GND: Tensor, rope_NC2: Tensor, dropout_p: float, seed: Tensor, scale: float, batch_item: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated q and k (k widened to H heads), the softmax, and the dropout mask (a scalar one without dropout)."""
    heads, positions, _ = q_HND.shape
    rope = rope_NC2[:positions]
    q = rotate(q_HND, rope).to(wide(q_HND.dtype))
    k = _widen_heads(rotate(k_GND, rope), heads)
    future = torch.ones(positions, positions, dtype=torch.bool, device=q.device).triu(1)
    probabilities_HNN = ((q @ k.mT) * scale).masked_fill(future, float("-inf")).softmax(-1)
    mask = q.new_ones(()) if dropout_p == 0 else dropout_mask(seed, batch_item, heads, positions, dropout_p)
    return q, k, probabilities_HNN, mask


def _widen_heads(x_GND: Tensor, heads: int) -> Tensor:
    """Query head h reads key-value head h // (H / G)."""
    return x_GND.to(wide(x_GND.dtype)).repeat_interleave(heads // x_GND.shape[0], 0)
