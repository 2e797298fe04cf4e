"""RMSNorm (Zhang and Sennrich, 2019), with LlamaGen's rounding points: norm in fp32, cast back, then the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.numerics import widen


def rms_norm(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x_wide = widen(x_XD)
    normed = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_XD.dtype) * weight_D.to(x_XD.dtype)


def rms_norm_backward(grad_XD: Tensor, x_XD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the derivation is in README.md."""
    grad_x, grad_weight = _wide_gradients(grad_XD, x_XD, weight_D, eps)
    return grad_x.to(x_XD.dtype), grad_weight.to(weight_D.dtype)


def add_rms_norm(x_XD: Tensor, residual_XD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x_XD.contiguous() + residual_XD
    return rms_norm(residual, weight_D, eps), residual


def add_rms_norm_backward(
    grad_normed_XD: Tensor, grad_residual_XD: Tensor, residual_XD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (that of the residual is the same) and weight, from the sum; one rounding at the end."""
    grad_x, grad_weight = _wide_gradients(grad_normed_XD, residual_XD, weight_D, eps)
    return (grad_x + grad_residual_XD).to(residual_XD.dtype), grad_weight.to(weight_D.dtype)


def _wide_gradients(grad_XD: Tensor, x_XD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_wide, grad = widen(x_XD), widen(grad_XD)
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    normed = x_wide * scale
    grad_weight = (grad * normed).flatten(0, -2).sum(0) if x_XD.dim() > 1 else grad * normed
    grad_normed = grad * weight_D.to(x_XD.dtype)
    along = (grad_normed * normed).mean(-1, keepdim=True)
    return (grad_normed - normed * along) * scale, grad_weight
