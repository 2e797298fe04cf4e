"""The compiled module, when there is one: loading, and the reason when it is missing."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TypedDict


class NativeInfo(TypedDict):
    loaded: bool
    isa: str | None
    reason: str | None


@cache
def native_module() -> tuple[ModuleType | None, str | None]:
    """``retinar.kernels._native`` and None, or None and the reason why it cannot be had."""
    try:
        from retinar.kernels import _native  # type: ignore[attr-defined]  # compiled, no stub
    except ImportError as error:
        return None, f"the compiled module retinar.kernels._native is not there ({error}); build it: pip install -e ."
    return _native, None


def native_missing() -> str | None:
    """Why native backends cannot run on this machine, or None."""
    return native_module()[1]


def native_info() -> NativeInfo:
    """Whether the compiled module is loaded, the instruction set it chose, and otherwise the reason."""
    module, reason = native_module()
    return NativeInfo(loaded=module is not None, isa=module.isa() if module is not None else None, reason=reason)
