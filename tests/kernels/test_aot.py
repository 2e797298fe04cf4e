"""Every variant of every kernel, compiled for both architectures without a GPU: no spills, and the page is not stale.

Needs Triton's compiler, so nothing here runs under its interpreter. Compiled code stays in Triton's cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import ARCHITECTURES, triton_missing

if triton_missing() or interpreting():
    pytest.skip(triton_missing() or "compiled in the other run: the interpreter is on", allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from retinar.bench import kernel_table
from retinar.kernels import aot
from retinar.kernels.launch import TYPES, Kernel, Variant

KERNELS = aot.kernels()
DTYPES = {name: dtype for dtype, name in TYPES.items()}
STALE = f"{kernel_table.PAGE.name} is stale: run make docs"


ROWS = [row for kernel in KERNELS for row in kernel_table.rows(kernel)]


@pytest.fixture(scope="module")
def page() -> str:
    return kernel_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_compiles_without_spills(row: kernel_table.Row, page: str) -> None:
    found = {variant: aot.compile_variant(row.kernel, variant) for variant in row.variants}
    for variant, resources in found.items():
        where = f"{row.kernel.name} {variant.name()}"
        assert resources.stack_bytes == 0, f"{where} spills {resources.stack_bytes} bytes a thread"
        assert resources.shared_bytes <= aot.SHARED_BLOCK_BYTES[variant.architecture], (
            f"{where}: too much shared memory"
        )
        assert not resources.serialized, f"{where}: the assembler serialises its matrix products (C7515)"
        assert resources.occupancy > 0, f"{where}: {resources.registers} registers do not fit"
    if f"Compiled by Triton {triton.__version__} " in page:  # another compiler gives other numbers
        assert row.line(found) in page.splitlines(), f"{STALE}\n{row.line(found)}"


def test_the_page_has_these_variants_and_costs(page: str) -> None:
    """Whatever the compiler: its lines are those of the tables, and its bounds those of specs and sizes."""
    assert page.startswith(kernel_table.preamble()), STALE
    ours = [" | ".join(row.cells()) for row in ROWS]
    assert len(set(ours)) == len(ours)
    theirs = re.findall(r"^\| (\w+ \| [^|]+ \| [^|]* \| \d+ x \d+) \|", page, flags=re.MULTILINE)
    assert sorted(theirs) == sorted(ours), STALE


def test_every_folder_with_kernels_lists_them() -> None:
    """A kernel that is missing from its folder's KERNELS would never be compiled here."""
    folders = {path.parent.name for path in Path(aot.__file__).parent.glob("*/gpu.py")}
    assert {kernel.op for kernel in KERNELS} == folders
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    for kernel in KERNELS:
        for architecture in ARCHITECTURES:
            assert kernel.variants[architecture], f"{kernel.name} has no variants for sm_{architecture}"
            assert all(each.architecture == architecture for each in kernel.variants[architecture])


def _launched(kernel: Kernel, variant: Variant, number: int) -> tuple[ASTSource, Any, list[Any]]:
    """What Triton's own launch code makes of arguments whose integers are all ``number``: the source that it would
    compile, its options, and the key under which it looks for a binary that it has."""
    backend = make_backend(GPUTarget("cuda", variant.architecture, 32))
    function, pointers, arguments = kernel.function, iter(variant.pointers), []
    for parameter in function.params:
        kind = parameter.annotation_type
        if kind:
            arguments.append(float(number) if kind.startswith("fp") else number)
        elif not parameter.is_constexpr:
            arguments.append(torch.empty(64, dtype=DTYPES[next(pointers)]))  # torch aligns to 64 bytes
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "debug": False}
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, key, _ = binder(*arguments, **dict(variant.constants), **options)
    parsed, signature, constants, attributes = function._pack_args(backend, options, bound, key, None)
    return ASTSource(function, signature, constants, attributes), parsed, key


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_launch_compiles_nothing_else(kernel: Kernel) -> None:
    """Triton's launch code comes to the source that was compiled here, whatever the integers: 1 and multiples of 16
    would make other binaries if an argument were missing from ``do_not_specialize``."""
    for architecture in ARCHITECTURES:
        for variant in aot.ordered(kernel, architecture):
            ast, target, options = aot.source(kernel, variant)
            ours = make_backend(target).parse_options(options)
            keys = []
            for number in (7, 1, 16, 0, -1, 2**40):
                source, theirs, key = _launched(kernel, variant, number)
                assert source.signature == ast.signature, (variant.name(), number)
                assert source.attrs == ast.attrs, (variant.name(), number)
                assert source.hash() == ast.hash(), (variant.name(), number)
                assert theirs == ours
                keys.append(key)
            assert all(key == keys[0] for key in keys), variant.name()


def test_a_specialised_integer_would_be_found() -> None:
    @triton.jit
    def careless(x, count: tl.int64):  # type: ignore[no-untyped-def]
        pass

    kernel = Kernel("careless", careless, lambda architecture: [Variant(architecture, ("fp32",), (), 4)])
    variant = next(iter(kernel.variants[90]))
    (plain, _, _), (divisible, _, _) = (_launched(kernel, variant, number) for number in (7, 16))
    assert plain.hash() != divisible.hash() != aot.source(kernel, variant)[0].hash()
    assert _launched(kernel, variant, 1)[2] != _launched(kernel, variant, 7)[2]
