"""Arguments of an op, nested as the specs have them: moved, copied, widened, strided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def change(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in (nested) arguments."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: change(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item, function) for item in value))
    return [change(item, function) for item in value] if isinstance(value, list) else value


def to_device(value: Any, device: str) -> Any:
    """Arguments on a device."""
    return change(value, lambda tensor: tensor.to(device))


def clone(value: Any) -> Any:
    """The same arguments in other memory."""
    return change(value, Tensor.clone)


def widen(value: Any) -> Any:
    """Floating tensors in fp64, which the references take: the truth."""
    return change(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def strided(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers with a gap after every element and the dimensions in reverse order in memory; NaN in the gaps.

    Caches stay: an op writes into them, and promises nothing about their strides.
    """
    return {key: value if "cache" in key else change(value, _strided) for key, value in inputs.items()}


def _strided(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    reverse = list(range(x.dim()))[::-1]
    out = torch.full((*x.permute(reverse).shape, 2), float("nan"), dtype=x.dtype, device=x.device)
    return out[..., 0].permute(reverse).copy_(x)
