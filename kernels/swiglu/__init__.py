"""SwiGLU: the gated activation of the feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.dispatch import Op, same_device
from retinar.kernels.launch import triton_backend
from retinar.kernels.swiglu import reference


def _packed(gate_up: Tensor) -> Tensor:
    return reference.swiglu(*gate_up.chunk(2, -1))


def _packed_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.cat(reference.swiglu_backward(grad, *gate_up.chunk(2, -1)), -1)


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


PACKED = Op("swiglu_packed(Tensor gate_up) -> Tensor", reference=_packed, fake=_half)
PACKED_BACKWARD = Op(
    "swiglu_packed_backward(Tensor grad, Tensor gate_up) -> Tensor",
    reference=_packed_backward,
    fake=lambda grad, gate_up: gate_up.new_empty(gate_up.shape),
)
PAIR = Op(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    reference=reference.swiglu,
    fake=lambda gate, up: gate.new_empty(gate.shape),
)
PAIR_BACKWARD = Op(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    reference=reference.swiglu_backward,
    fake=lambda grad, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)


def swiglu(gate_up_X2F: Tensor, up_XF: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``silu(gate) * up``, on a packed tensor or on two.

    Computed in fp32 with one rounding at the end; the backward recomputes from the inputs, nothing else is saved. The
    bits of an element depend on its own gate and up alone.

    Args:
        gate_up_X2F: [..., 2F], the gate (w1 x) in the first half and up (w3 x) in the second; or, with ``up_XF``, the
            gate [..., F] alone.
        up_XF: [..., F] in the gate's dtype, or None for the packed form.
        backend: "reference", "triton" (CUDA; fp32, bf16, fp16), or None to choose by device.

    Returns:
        [..., F] in the input's dtype, contiguous. Differentiable in all inputs.

    Raises:
        ValueError: an odd packed width, shapes, dtypes or devices that do not fit, or a backend that cannot run.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    if gate_up_X2F.dim() == 0 or not gate_up_X2F.is_floating_point():
        raise ValueError(
            f"swiglu: expected a floating point tensor [..., 2F], found {tuple(gate_up_X2F.shape)} {gate_up_X2F.dtype}"
        )
    if up_XF is None:
        if gate_up_X2F.shape[-1] % 2:
            raise ValueError(f"swiglu: expected an even packed width [gate | up], found {gate_up_X2F.shape[-1]}")
        return PACKED(gate_up_X2F, backend=backend)
    if up_XF.shape != gate_up_X2F.shape or up_XF.dtype != gate_up_X2F.dtype:
        raise ValueError(
            f"swiglu: expected gate and up of one shape and dtype, found {tuple(gate_up_X2F.shape)} "
            f"{gate_up_X2F.dtype} and {tuple(up_XF.shape)} {up_XF.dtype}"
        )
    same_device("swiglu", gate_up_X2F, up_XF)
    return PAIR(gate_up_X2F, up_XF, backend=backend)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward_packed(ctx: Any, grad: Tensor) -> Tensor:
    return PACKED_BACKWARD(grad, *ctx.saved_tensors, backend=PACKED_BACKWARD.own(ctx.backend))


def _backward_pair(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return PAIR_BACKWARD(grad, *ctx.saved_tensors, backend=PAIR_BACKWARD.own(ctx.backend))


PACKED.register("triton", triton_backend("swiglu", "swiglu_packed"))
PACKED_BACKWARD.register("triton", triton_backend("swiglu", "swiglu_packed_backward"))
PAIR.register("triton", triton_backend("swiglu", "swiglu"))
PAIR_BACKWARD.register("triton", triton_backend("swiglu", "swiglu_backward"))
PACKED.differentiate(_backward_packed, _save)
PAIR.differentiate(_backward_pair, _save)
