"""Mean cross-entropy of ``hidden W^T`` against targets, in row chunks: the logits never exist as a whole.

The gradients of a scalar loss are known up to its own gradient, so one pass over the chunks makes loss and gradients
together while a chunk's logits are at hand, and nothing is computed twice. Everything is fp32; the gradients stay fp32
until the backward has scaled them, since a scaled loss (fp16) would underflow otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.numerics import widen

IGNORED = -100
CHUNK_ELEMENTS = 1 << 22  # 16 MB of logits: they stay in a server's last-level cache between the passes


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and with ``gradients`` those of hidden and weight for a loss gradient of one (else two empty tensors)."""
    hidden, weight = widen(hidden_TD), widen(weight_VD)
    kept_T = targets_T != IGNORED
    each = kept_T.sum().to(hidden.dtype).reciprocal()  # no target at all: 0 * inf, a NaN, as in torch
    loss = hidden.new_zeros(())
    grad_hidden, grad_weight = hidden.new_empty(0), weight.new_empty(0)
    if gradients:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        kept, target = kept_T[part], targets_T[part].clamp(min=0)
        log_probabilities_CV = (hidden[part] @ weight.t()).log_softmax(-1)
        loss -= (log_probabilities_CV.gather(1, target[:, None])[:, 0] * kept).sum()
        if gradients:
            grad_logits = log_probabilities_CV.exp_()  # up to each row's factor, which the narrower factors take
            grad_logits[torch.arange(len(target), device=target.device), target] -= 1
            factor = (kept * each)[:, None]
            torch.mm(grad_logits, weight, out=grad_hidden[part]).mul_(factor)
            grad_weight.addmm_(grad_logits.t(), hidden[part] * factor)
    return loss * each, grad_hidden, grad_weight


def linear_cross_entropy_backward(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of hidden or weight: what the forward kept, times the loss's own gradient, rounded once."""
    return (gradient * grad_loss).to(dtype)
