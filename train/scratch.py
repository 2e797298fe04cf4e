"""What our GPU kernels allocate beside their results: the buffers of their launchers, in bytes.

The launchers decide; these are their shapes once more, for machines without Triton. A test runs the launchers in
Triton's interpreter and holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retinar.train.memory_trace import Scratch

FLOAT = 4  # bytes
PARTIALS = 1024  # at most so many programs add up rows of a norm's weight gradient


def _loss(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, gradients: bool) -> int:
    """A chunk's logits in fp32; their gradients beside them where those are narrower; a loss for every target."""
    tokens, vocabulary = len(hidden_TD), _whole(len(weight_VD), 8)
    chunks = max(1, -(-tokens // min(max(tokens // 8, 2048), 4096)))
    rows = min(_whole(-(-tokens // chunks), 8), max(tokens, 1))
    narrow = hidden_TD.element_size() if gradients and hidden_TD.dtype != torch.float32 else 0
    return rows * vocabulary * (FLOAT + narrow) + FLOAT * (tokens + 1)


def _norm_backward(grad: Tensor, *others: Any) -> int:
    """The programs' shares of the weight's gradient, in fp32; programs are at most so many."""
    width = grad.shape[-1]
    return min(grad.numel() // width, PARTIALS) * width * FLOAT


def _attention(qkv_BNTD: Tensor, heads: int, *others: Any) -> int:
    """The rotated keys."""
    return _rotated(qkv_BNTD, _groups(qkv_BNTD, heads))


def _attention_backward(grad_BHND: Tensor, qkv_BNTD: Tensor, heads: int, *others: Any) -> int:
    """Rotated queries and keys, and two numbers a row. Where heads share keys and values, the gradients of these for
    each head, and one of their sums. (Parts of a projection that begin between 16-byte addresses are copied besides:
    no named size has such.)"""
    batch, positions, _, head_dim = qkv_BNTD.shape
    groups = _groups(qkv_BNTD, heads)
    rows = 2 * batch * heads * _whole(positions, 128) * FLOAT
    apart = (2 * heads + groups) * batch * positions * head_dim * qkv_BNTD.element_size() if groups < heads else 0
    return _rotated(qkv_BNTD, heads + groups) + rows + apart


def _groups(qkv_BNTD: Tensor, heads: int) -> int:
    return (qkv_BNTD.shape[2] - heads) // 2


def _rotated(qkv_BNTD: Tensor, heads: int) -> int:
    """So many heads, where they are rotated before the kernel that reads them: always at head dims other than 32 and
    64, which are padded to 128; at these from 256 positions on, but not in fp32."""
    batch, positions, _, head_dim = qkv_BNTD.shape
    narrow = head_dim in (32, 64)
    if narrow and (positions <= 256 or qkv_BNTD.dtype == torch.float32):
        return 0
    return batch * heads * positions * (head_dim if narrow else 128) * qkv_BNTD.element_size()


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit


SCRATCH: Mapping[str, Scratch] = {
    "retinar::linear_cross_entropy": _loss,
    "retinar::rms_norm_backward": _norm_backward,
    "retinar::add_rms_norm_backward": _norm_backward,
    "retinar::rope_attention_packed": _attention,
    "retinar::rope_attention_packed_backward": _attention_backward,
}
"""For :class:`MemoryTrace`. Forward norms and SwiGLU need nothing beside their results."""
