"""Ahead-of-time compilation of the Triton kernels, without a GPU: registers, spills and shared memory of each variant.

Needs Triton, whose wheel carries NVIDIA's assembler and ``cuobjdump``, in a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import ARCHITECTURES, Kernel, Variant

__all__ = ["ARCHITECTURES", "Kernel", "Resources", "Variant", "compile_variant", "kernels", "ordered", "source"]

# A multiprocessor's, from NVIDIA's "CUDA C++ Programming Guide", "Technical Specifications per Compute Capability".
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
SHARED_BLOCK_BYTES = {80: 99 * 1024, 90: 227 * 1024}  # of one block; 8.6 and 8.9 too, which run the variants of 80
RESERVED_BYTES = 1024  # of each block, by the system

SERIALIZED = "instructions are serialized"  # of the assembler's note C7515


@dataclass(frozen=True)
class Resources:
    """What one variant occupies. ``registers``: a thread; ``stack_bytes``: a thread's local memory, where spilled
    registers go; ``shared_bytes``: a block; ``serialized``: the assembler found no way to let the asynchronous matrix
    products of 9.0 overlap (its note C7515), so that each waits for the one before."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    architecture: int
    serialized: bool = False

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's 64 warps that can be resident."""
        per_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(
            BLOCKS,
            WARPS // self.num_warps,
            REGISTERS // (per_warp * self.num_warps),
            SHARED_BYTES[self.architecture] // (self.shared_bytes + RESERVED_BYTES),
        )
        return blocks * self.num_warps / WARPS


def kernels() -> tuple[Kernel, ...]:
    """The kernels of every op folder that has a ``gpu.py``."""
    here = Path(__file__).resolve().parent
    folders = sorted(path.parent.name for path in here.glob("*/gpu.py"))
    return tuple(
        kernel
        for folder in folders
        for kernel in importlib.import_module(f"retinar.kernels.{folder}.gpu").KERNELS
    )  # fmt: skip


def ordered(kernel: Kernel, architecture: int) -> list[Variant]:
    """The variants of a kernel, in the same order in every process."""

    def order(each: Variant) -> tuple[Any, ...]:
        return each.pointers, tuple(int(value) for _, value in each.constants), each.num_warps, each.num_stages

    return sorted(kernel.variants[architecture], key=order)


def source(kernel: Kernel, variant: Variant) -> tuple[Any, Any, dict[str, int]]:
    """What a launch of the variant hands to Triton's compiler: (ASTSource, GPUTarget, options)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: compile in a process where it is unset")
    constants = dict(variant.constants)
    pointers = iter(variant.pointers)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.function.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        else:
            signature[parameter.name] = f"*{next(pointers, '')}"
            attributes[(place,)] = [["tt.divisibility", 16]]
    names = [name for name, kind in signature.items() if kind == "constexpr"]
    if "*" in signature.values() or next(pointers, None) is not None or list(constants) != names:
        raise ValueError(f"{kernel.name}: the variant {variant.name()} does not fit the arguments {signature}")
    return (
        ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=attributes),
        GPUTarget("cuda", variant.architecture, 32),
        {"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )


def compile_variant(kernel: Kernel, variant: Variant) -> Resources:
    """Compiles one variant to machine code, exactly as its first launch would, and reads what it needs.

    Triton caches the code on disk (``TRITON_CACHE_DIR``), so the second time costs milliseconds.
    """
    import triton

    ast, target, options = source(kernel, variant)
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(ast, target=target, options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    serialized = "wgmma.mma_async" in compiled.asm["ptx"] and SERIALIZED in _log(compiled, said.getvalue())
    return Resources(registers, stack, compiled.metadata.shared, variant.num_warps, variant.architecture, serialized)


def _log(compiled: Any, said: str) -> str:
    """What the assembler said of a kernel, kept beside its code: ``said`` is empty when that comes from the cache."""
    import triton
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(compiled.hash)
    kept = cache.get_file("ptxas.log")
    if not said and kept is not None:
        return Path(kept).read_text(encoding="utf-8")
    if not said:  # compiled by a launch, which does not keep it
        with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    cache.put(said, "ptxas.log", binary=False)
    return said


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread, read from the machine code by NVIDIA's cuobjdump."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {said!r}")
    return int(found[1]), int(found[2]) + int(found[3])
