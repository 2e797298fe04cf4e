"""RMSNorm, and RMSNorm after adding the residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.dispatch import Implementation, Op, same_device
from retinar.kernels.launch import triton_backend
from retinar.kernels.native import native_missing, native_module
from retinar.kernels.rms_norm import reference

NORM = Op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference.rms_norm,
    fake=lambda x, weight, eps: x.new_empty(x.shape),
)
NORM_BACKWARD = Op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=reference.rms_norm_backward,
    fake=lambda grad, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
ADD_NORM = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=reference.add_rms_norm,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
ADD_NORM_BACKWARD = Op(
    "add_rms_norm_backward(Tensor grad, Tensor grad_residual, Tensor residual, Tensor weight, float eps) "
    "-> (Tensor, Tensor)",
    reference=reference.add_rms_norm_backward,
    fake=lambda grad, grad_residual, residual, weight, eps: (
        residual.new_empty(residual.shape),
        weight.new_empty(weight.shape),
    ),
)


def rms_norm(x_XD: Tensor, weight_D: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """RMSNorm over the last dimension: ``(x / sqrt(mean(x^2) + eps)) * weight``.

    Computed in fp32, cast to x's dtype, then multiplied by the weight in x's dtype (LlamaGen's rounding points). The
    bits of a row depend on that row alone.

    Args:
        x_XD: [..., D], any strides; fp32, bf16, fp16 (fp64 on the reference).
        weight_D: [D], any floating dtype.
        eps: added to the mean square.
        backend: "reference", "triton" (CUDA; fp32, bf16, fp16), "native" (CPU; fp32, bf16; forward only, the gradient
            is the reference's), or None to choose by device.

    Returns:
        [..., D] in x's dtype, contiguous. Differentiable in x and weight.

    Raises:
        ValueError: shapes or devices that do not fit, or a backend that cannot run.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    _check("rms_norm", x_XD, weight_D)
    return NORM(x_XD, weight_D, eps, backend=backend)


def add_rms_norm(
    x_XD: Tensor, residual_XD: Tensor, weight_D: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Adds the residual, then normalises: ``r = x + residual; return rms_norm(r, weight), r``.

    Args:
        x_XD, residual_XD: [..., D] of one shape and dtype.
        weight_D, eps, backend: as in :func:`rms_norm`.

    Returns:
        (normed, new residual), both [..., D] in x's dtype. Differentiable in x, residual and weight.
    """
    _check("add_rms_norm", x_XD, weight_D)
    same_device("add_rms_norm", x_XD, residual_XD)
    if residual_XD.shape != x_XD.shape or residual_XD.dtype != x_XD.dtype:
        raise ValueError(
            f"add_rms_norm: expected x and residual of one shape and dtype, found {tuple(x_XD.shape)} {x_XD.dtype} and "
            f"{tuple(residual_XD.shape)} {residual_XD.dtype}; cast or reshape one of them"
        )
    return ADD_NORM(x_XD, residual_XD, weight_D, eps, backend=backend)


def _check(op: str, x_XD: Tensor, weight_D: Tensor) -> None:
    if x_XD.dim() == 0 or weight_D.dim() != 1 or weight_D.shape[0] != x_XD.shape[-1]:
        raise ValueError(
            f"{op}: expected x [..., D] and weight [D], found {tuple(x_XD.shape)} and {tuple(weight_D.shape)}"
        )
    if not x_XD.is_floating_point() or not weight_D.is_floating_point():
        raise ValueError(f"{op}: expected floating point tensors, found {x_XD.dtype} and {weight_D.dtype}")
    same_device(op, x_XD, weight_D)


def _native(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    module, _ = native_module()
    assert module is not None  # the dispatch asked native_missing first
    x_XD = x_XD.detach().contiguous()
    out_XD = torch.empty_like(x_XD)
    weight_D = weight_D.detach().to(x_XD.dtype).contiguous()
    width = x_XD.shape[-1]
    if out_XD.numel():
        module.rms_norm(x_XD.view(-1, width), weight_D, out_XD.view(-1, width), eps)
    return out_XD


def _native_add(x_XD: Tensor, residual_XD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual_XD = x_XD.contiguous() + residual_XD
    return _native(residual_XD, weight_D, eps), residual_XD


def _native_unsupported(x_XD: Tensor, *_: Any) -> str | None:
    if x_XD.dtype in (torch.float32, torch.bfloat16):
        return None
    return f"it takes float32 and bfloat16, found {x_XD.dtype}"


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x_XD, weight_D, ctx.eps = inputs
    ctx.save_for_backward(x_XD, weight_D)


def _norm_backward(ctx: Any, grad_XD: Tensor) -> tuple[Any, ...]:
    x_XD, weight_D = ctx.saved_tensors
    backend = NORM_BACKWARD.own(ctx.backend)
    return *NORM_BACKWARD(grad_XD, x_XD, weight_D, ctx.eps, backend=backend), None


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, weight_D, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight_D)
    ctx.set_materialize_grads(False)  # the gradient of an unused result is None, not a tensor of zeros to read


def _add_norm_backward(ctx: Any, grad_XD: Tensor | None, grad_residual_XD: Tensor | None) -> tuple[Any, ...]:
    residual_XD, weight_D = ctx.saved_tensors
    if grad_XD is None:
        return grad_residual_XD, grad_residual_XD, None, None
    if grad_residual_XD is None:
        backend = NORM_BACKWARD.own(ctx.backend)
        grad_x, grad_weight = NORM_BACKWARD(grad_XD, residual_XD, weight_D, ctx.eps, backend=backend)
    else:
        backend = ADD_NORM_BACKWARD.own(ctx.backend)
        grads = grad_XD, grad_residual_XD
        grad_x, grad_weight = ADD_NORM_BACKWARD(*grads, residual_XD, weight_D, ctx.eps, backend=backend)
    return grad_x, grad_x, grad_weight, None


for _op in (NORM, NORM_BACKWARD, ADD_NORM, ADD_NORM_BACKWARD):
    # Not bf16 under the interpreter, which cuts numbers off to it instead of rounding them: two cuts a result.
    _op.register("triton", triton_backend("rms_norm", _op.name, products=True))
NORM.register("native", Implementation(_native, ("cpu",), native_missing, _native_unsupported))
ADD_NORM.register("native", Implementation(_native_add, ("cpu",), native_missing, _native_unsupported))
NORM.differentiate(_norm_backward, _save_norm)
ADD_NORM.differentiate(_add_norm_backward, _save_add_norm)
