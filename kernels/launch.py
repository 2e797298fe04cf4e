"""Launching Triton kernels: each kernel has one table of variants, shared by launchers and the ahead-of-time compiler.

A variant is everything that makes Triton compile another binary: architecture, pointer types, constants, warps and
pipeline stages. `Kernel.launch` refuses one that is not in the kernel's table, and the test suite compiles every entry
of every table for 8.0 and 9.0, so no binary runs there whose registers and spills nobody has looked at. (Other GPUs of
compute capability 8 and above take the same variants.) For that to hold, nothing else may specialise a kernel: pointers
are always 16-byte aligned (`aligned`), and integers are annotated ``tl.int64`` and named in ``do_not_specialize``. What
the compiler should know about a stride is a factor: pass ``stride // VEC`` and multiply by the constant VEC inside.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retinar.kernels.dispatch import Implementation, Reason, interpreting

#: Architectures that every table has variants for: compute capability 8.x (A100) and 9.0 or 10.x (H100, H200, B200).
ARCHITECTURES = (80, 90)

TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
TOO_OLD = "it needs a GPU of compute capability 8.0 or newer"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def architecture(device: torch.device) -> int | None:
    """The entry of `ARCHITECTURES` whose variants fit a device; None for one that is too old.

    9.0 and 10.x give a block 227 KB of shared memory; 8.6, 8.9 and 12.x give it 99 KB, and the variants for 80 keep
    below that.
    """
    if device.type != "cuda":
        return ARCHITECTURES[-1]  # the interpreter: any will do
    major, _ = torch.cuda.get_device_capability(device)
    return 90 if major in (9, 10) else 80 if major >= 8 else None


@dataclass(frozen=True)
class Variant:
    """One binary. ``pointers``: element types in the order of the kernel's pointer arguments; ``constants``: (name,
    value) in the order of its constexpr arguments."""

    architecture: int
    pointers: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int = 1

    def name(self) -> str:
        """For tables and test ids: the numbers that differ between the variants of one kernel."""
        constants = " ".join(f"{name}={int(value)}" for name, value in self.constants)
        return f"sm_{self.architecture} {','.join(self.pointers)} {constants} warps={self.num_warps}".replace("  ", " ")


class Kernel:
    """A Triton function with the table of its variants.

    Args:
        op: folder of the op that it belongs to.
        function: the ``triton.jit`` function. Arguments: pointers without annotation, ``tl.int64`` and ``tl.float32``
            scalars, ``tl.constexpr`` constants.
        table: architecture -> every variant that a launcher may ask for there.
    """

    def __init__(self, op: str, function: Any, table: Callable[[int], Iterable[Variant]]) -> None:
        self.op, self.function = op, function
        self.name = function.__name__.strip("_")
        self.variants = {each: frozenset(table(each)) for each in ARCHITECTURES}

    def launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Mapping[str, Any], num_warps: int,
        num_stages: int = 1,
    ) -> None:  # fmt: skip
        """Runs one variant on the arguments' device; ``arguments`` are those of the function without its constants.

        RuntimeError when the variant is not in the table or a tensor is not aligned: a mistake in a launcher.
        """
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        variant = Variant(
            architecture(tensors[0].device) or 0,
            tuple(TYPES[each.dtype] for each in tensors),
            tuple(constants.items()),
            num_warps,
            num_stages,
        )
        if variant not in self.variants.get(variant.architecture, ()):
            raise RuntimeError(f"{self.name}: no such variant was declared: {variant.name()}")
        if any(each.data_ptr() % 16 for each in tensors):
            raise RuntimeError(f"{self.name}: a pointer is not aligned to 16 bytes")
        with _where(self.name, tensors[0].device):
            self.function[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


def _where(name: str, device: torch.device) -> Any:
    """The device to launch on; under the interpreter, a range that a profile shows as a GPU's would show the kernel."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.profiler.record_function(name)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy of it when it does not start at a multiple of 16 bytes (a view with an odd offset)."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.preserve_format)


def kernel_dtypes(*, products: bool = False) -> tuple[torch.dtype, ...]:
    """Dtypes that the backend "triton" takes in this process, for ``OpSpec.narrow``."""
    return (torch.float32, torch.float16) if products and interpreting() else FLOATS


def triton_backend(
    folder: str, function: str, *, products: bool = False, unsupported: Callable[..., Reason] = lambda *_: None
) -> Implementation:
    """The backend "triton" of an op: ``function`` of ``retinar.kernels.<folder>.gpu``, imported at its first call.

    ``products``: the kernel multiplies matrices, which Triton's interpreter cannot do in bfloat16. ``unsupported``:
    what else it does not take.
    """

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"retinar.kernels.{folder}.gpu"), function)(*args)

    def refused(*args: Any) -> Reason:
        first = next(each for each in args if isinstance(each, Tensor))
        takes = kernel_dtypes(products=products)
        if first.dtype not in takes:
            names = ", ".join(str(each).removeprefix("torch.") for each in takes)
            return f"it takes {names}{' under the interpreter' if interpreting() else ''}, found {first.dtype}"
        if architecture(first.device) is None:
            return TOO_OLD
        return unsupported(*args)

    return Implementation(run, ("cuda", "cpu") if interpreting() else ("cuda",), triton_missing, refused)


def triton_missing() -> Reason:
    """None where Triton is installed, and the GPU, where there is one, is of a kind that it can serve."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (retinar[triton])"
    if torch.cuda.is_available() and architecture(torch.device("cuda", torch.cuda.current_device())) is None:
        return TOO_OLD
    return None


def flash_missing() -> Reason:
    """None where the package flash-attn is installed: the backend "flash" of the attention ops."""
    return None if importlib.util.find_spec("flash_attn") is not None else "the package flash-attn is not installed"
