"""Causal attention with the rotary embedding applied to q and k: rotation in fp32 and cast, everything after in fp32.

Heads are computed one batch item at a time, so that the N x N scores of a whole batch never exist together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.numerics import wide
from retinar.kernels.philox.reference import DOMAIN_ATTENTION, philox4x32
from retinar.kernels.rope_attention.rope import rotate, rotate_back


def rope_attention(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, rope_NC2: Tensor, dropout_p: float, seed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] over [B, N, H, D] memory, and the log-sum-exp of the scores [B, H, N], fp32."""
    o_BHND = q_BHND.new_empty(q_BHND.transpose(1, 2).shape).transpose(1, 2)
    lse_BHN = q_BHND.new_empty(q_BHND.shape[:3], dtype=wide(q_BHND.dtype))
    for b, (q_HND, k_GND, v_GND) in enumerate(zip(q_BHND, k_BGND, v_BGND, strict=True)):
        _, _, scores_HNN, mask_HNN = _scores(q_HND, k_GND, rope_NC2, dropout_p, seed, scale, b)
        v_HND = _widen_heads(v_GND, q_HND.shape[0])
        o_BHND[b] = (scores_HNN.softmax(-1) * mask_HNN) @ v_HND
        lse_BHN[b] = scores_HNN.logsumexp(-1)
    return o_BHND, lse_BHN


def rope_attention_backward(
    grad_BHND: Tensor,
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    o_BHND: Tensor,
    lse_BHN: Tensor,
    rope_NC2: Tensor,
    dropout_p: float,
    seed: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; scores and the dropout mask are made again. The derivation is in README.md.

    The output and the log-sum-exp, which spare kernels work, are not needed here.
    """
    heads, groups = q_BHND.shape[1], k_BGND.shape[1]
    rope = rope_NC2[: q_BHND.shape[2]]
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q_BHND, k_BGND, v_BGND))
    for b, (grad_o, q_HND, k_GND, v_GND) in enumerate(zip(grad_BHND, q_BHND, k_BGND, v_BGND, strict=True)):
        q, k, scores, mask = _scores(q_HND, k_GND, rope_NC2, dropout_p, seed, scale, b)
        p = scores.softmax(-1)
        v, grad_o = _widen_heads(v_GND, heads), grad_o.to(wide(grad_o.dtype))
        grad_p = (grad_o @ v.mT) * mask
        grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * scale
        grad_q[b] = rotate_back(grad_scores @ k, rope)
        grad_k[b] = rotate_back((grad_scores.mT @ q).unflatten(0, (groups, -1)).sum(1), rope)
        grad_v[b] = ((p * mask).mT @ grad_o).unflatten(0, (groups, -1)).sum(1)
    return grad_q, grad_k, grad_v


def split_packed(qkv_BNTD: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D], k and v [B, G, N, D] as views of a packed projection [B, N, H + 2 G, D]."""
    groups = (qkv_BNTD.shape[2] - heads) // 2
    q_BHND, k_BGND, v_BGND = qkv_BNTD.transpose(1, 2).split([heads, groups, groups], dim=1)
    return q_BHND, k_BGND, v_BGND


def rope_attention_packed(qkv_BNTD: Tensor, heads: int, *settings: Any) -> tuple[Tensor, Tensor]:
    return rope_attention(*split_packed(qkv_BNTD, heads), *settings)


def rope_attention_packed_backward(grad_BHND: Tensor, qkv_BNTD: Tensor, heads: int, *others: Any) -> Tensor:
    grad_qkv_BNTD = qkv_BNTD.new_empty(qkv_BNTD.shape)
    grads = rope_attention_backward(grad_BHND, *split_packed(qkv_BNTD, heads), *others)
    for part, grad in zip(split_packed(grad_qkv_BNTD, heads), grads, strict=True):
        part.copy_(grad)
    return grad_qkv_BNTD


def dropout_threshold(dropout_p: float) -> int:
    """The probability in 256ths, which is what one random byte can decide: at least one when anything is dropped."""
    return 0 if dropout_p == 0 else min(max(round(dropout_p * 256), 1), 255)


def dropout_mask(seed: Tensor, batch_item: int, heads: int, positions: int, dropout_p: float) -> Tensor:
    """fp32 [H, N, N]: 0 where dropped, 256 / (256 - t) where kept, with t the threshold.

    The byte of (query, key) for head bh = b * H + h is byte key % 16 (lowest first, word by word) of
    philox(counter = (key // 16, query, bh, domain), key = seed); it is kept when byte >= t.
    """
    device, threshold = seed.device, dropout_threshold(dropout_p)
    query = torch.arange(positions, device=device)[:, None]
    block = torch.arange(-(-positions // 16), device=device)[None, :]
    shifts = torch.arange(0, 32, 8, device=device)
    mask = torch.empty(heads, positions, positions, device=device)
    for h in range(heads):  # one head at a time: the words of all heads together would need gigabytes for GPT-XL
        head, domain = (torch.tensor(each, device=device) for each in (batch_item * heads + h, DOMAIN_ATTENTION))
        words = torch.stack(philox4x32((block, query, head, domain), seed), -1)
        kept = ((words[..., None] >> shifts) & 0xFF).flatten(1)[:, :positions] >= threshold
        torch.mul(kept, 256 / (256 - threshold), out=mask[h])
    return mask


def _scores(
    q_HND: Tensor, k_GND: Tensor, rope_NC2: Tensor, dropout_p: float, seed: Tensor, scale: float, batch_item: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated q and k (k widened to H heads), the scores, and the dropout mask (a scalar one without dropout)."""
    heads, positions, _ = q_HND.shape
    rope = rope_NC2[:positions]
    q = rotate(q_HND, rope).to(wide(q_HND.dtype))
    k = _widen_heads(rotate(k_GND, rope), heads)
    future = torch.ones(positions, positions, dtype=torch.bool, device=q.device).triu(1)
    scores_HNN = ((q @ k.mT) * scale).masked_fill(future, float("-inf"))
    mask = q.new_ones(()) if dropout_p == 0 else dropout_mask(seed, batch_item, heads, positions, dropout_p)
    return q, k, scores_HNN, mask


def _widen_heads(x_GND: Tensor, heads: int) -> Tensor:
    """Query head h reads key-value head h // (H / G)."""
    return x_GND.to(wide(x_GND.dtype)).repeat_interleave(heads // x_GND.shape[0], 0)
