"""SwiGLU (Shazeer, 2020): ``silu(gate) * up`` in fp32, one rounding at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.numerics import lanewise, widen


def swiglu(gate_XF: Tensor, up_XF: Tensor) -> Tensor:
    return lanewise(F.silu, widen(gate_XF)).mul(up_XF).to(gate_XF.dtype)


def swiglu_backward(grad_XF: Tensor, gate_XF: Tensor, up_XF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up: silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g), recomputed from the inputs."""
    grad, gate = widen(grad_XF), widen(gate_XF)
    grad_gate = torch.ops.aten.silu_backward(grad * up_XF, gate)
    return grad_gate.to(gate_XF.dtype), F.silu(gate).mul_(grad).to(up_XF.dtype)
