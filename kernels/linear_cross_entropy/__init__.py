"""The loss over the vocabulary, straight from hidden states and the output weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.dispatch import Op, same_device
from retinar.kernels.launch import triton_backend
from retinar.kernels.linear_cross_entropy import reference
from retinar.kernels.numerics import wide


def _fake(hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    compute = wide(hidden.dtype)
    loss = hidden.new_empty((), dtype=compute)
    if not gradients:
        return loss, hidden.new_empty(0, dtype=compute), hidden.new_empty(0, dtype=compute)
    return loss, hidden.new_empty(hidden.shape, dtype=compute), weight.new_empty(weight.shape, dtype=compute)


LOSS = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, bool gradients) -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    fake=_fake,
)
LOSS_BACKWARD = Op(
    "linear_cross_entropy_backward(Tensor grad_loss, Tensor gradient, ScalarType dtype) -> Tensor",
    reference=reference.linear_cross_entropy_backward,
    fake=lambda grad_loss, gradient, dtype: gradient.new_empty(gradient.shape, dtype=dtype),
)
LOSS.register("triton", triton_backend("linear_cross_entropy", "linear_cross_entropy"))
LOSS_BACKWARD.register("triton", triton_backend("linear_cross_entropy", "linear_cross_entropy_backward"))


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, backend: str | None = None
) -> Tensor:
    """Mean cross-entropy of ``hidden weight^T`` against the targets; targets of -100 do not count.

    When gradients are wanted they are computed together with the loss and kept in fp32 until the backward, so the
    forward does all the work and the backward is a product with one number.

    Args:
        hidden_TD: [T, D], any floating dtype.
        weight_VD: [V, D]; a weight of another floating dtype is cast to hidden's first, as autocast would.
        targets_T: int64 [T], in [0, V) or -100. Not checked against V (that would wait for the device).
        backend: "triton" (CUDA; fp32, bf16, fp16), "reference", or None to choose by device.

    Returns:
        fp32 scalar, NaN when every target is ignored. Differentiable in hidden and weight, once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: expected hidden [T, D] and weight [V, D], found {tuple(hidden_TD.shape)} and "
            f"{tuple(weight_VD.shape)}"
        )
    if targets_T.shape != hidden_TD.shape[:1] or targets_T.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: expected int64 targets [{hidden_TD.shape[0]}], found {targets_T.dtype} "
            f"{tuple(targets_T.shape)}"
        )
    if not hidden_TD.is_floating_point() or not weight_VD.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: expected floating point tensors, found {hidden_TD.dtype} and {weight_VD.dtype}"
        )
    if weight_VD.shape[0] == 0:
        raise ValueError("linear_cross_entropy: expected a weight [V >= 1, D], found an empty vocabulary")
    same_device("linear_cross_entropy", hidden_TD, weight_VD, targets_T)
    weight_VD = weight_VD.to(hidden_TD.dtype)
    gradients = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return LOSS(hidden_TD, weight_VD, targets_T, gradients, backend=backend)[0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, _, ctx.gradients = inputs
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None or not ctx.gradients:
        return None, None, None, None
    own = LOSS_BACKWARD.own(ctx.backend)
    grads = (
        LOSS_BACKWARD(grad_loss, gradient, dtype, backend=own) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    )
    return *grads, None, None


LOSS.differentiate(_backward, _save)
