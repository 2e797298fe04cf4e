"""docs/kernels.md: what each Triton kernel occupies, and what its op costs at least: ``make docs``.

Resources come from machine code compiled here for both architectures, bytes and FLOPs from the ops' specs, sizes from
`retinar.bench.cases`. Nothing in it is a measured time. The test suite holds the page to the code (tests/kernels/
test_aot.py).
"""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from retinar.bench import cases, machine
from retinar.bench.deadline import Deadline
from retinar.bench.precompile import precompile
from retinar.bench.report import percent, seconds
from retinar.engine.files import write_text
from retinar.kernels import aot, ops
from retinar.kernels.spec import ALL_SPECS, OpSpec

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
WIDTH = 120  # of a line of prose


class Gpu(NamedTuple):
    """Data sheet rates, dense: tensor cores in bf16, fp32 without them, device memory."""

    name: str
    bf16: float
    fp32: float
    bytes: float


# NVIDIA's data sheets: A100 80 GB SXM; H200 SXM (whose tensor rate is printed with sparsity: half of it is dense).
GPUS = (Gpu("A100", 312e12, 19.5e12, 2039e9), Gpu("H200", 989e12, 67e12, 4800e9))

# Ops whose products are fp32's by definition, whatever the inputs' dtype.
FP32_PRODUCTS = {"vq_lookup"}


class Row(NamedTuple):
    """The variants of a kernel that differ in nothing but the architecture: a line of the page, a test of the suite."""

    kernel: aot.Kernel
    variants: tuple[aot.Variant, ...]

    @property
    def id(self) -> str:
        """For test ids."""
        return f"{self.kernel.name}-{' '.join(self.cells()[1:])}"

    @property
    def narrow(self) -> bool:
        """Whether it runs when training does: in bf16, or whatever the dtype."""
        typed = any("bf16" in each.pointers for each in self.kernel.variants[aot.ARCHITECTURES[0]])
        return "bf16" in self.variants[0].pointers or not typed

    def cells(self) -> list[str]:
        """What tells it from the other rows."""
        first = self.variants[0]
        runs = [(kind, len(list(same))) for kind, same in itertools.groupby(first.pointers)]
        pointers = " ".join(kind if count == 1 else f"{count}x {kind}" for kind, count in runs)
        constants = " ".join(f"{name}={int(value)}" for name, value in first.constants)
        return [self.kernel.name, pointers, constants, f"{first.num_warps} x {first.num_stages}"]

    def line(self, found: Mapping[aot.Variant, aot.Resources]) -> str:
        """Its line of the page; spills are written out only where training runs."""
        cells = self.cells()
        for architecture in aot.ARCHITECTURES:
            each = next((found[v] for v in self.variants if v.architecture == architecture), None)
            numbers = ["-"] * 4
            if each is not None:
                shared = f"{each.shared_bytes / 1024:.3g}"
                numbers = [str(each.registers), str(each.stack_bytes), shared, percent(each.occupancy)]
            cells += numbers if self.narrow else [", ".join(numbers)]
        return line(cells)


def rows(kernel: aot.Kernel) -> list[Row]:
    """Every variant of a kernel, in one order in every process."""
    groups: dict[tuple[object, ...], list[aot.Variant]] = {}
    for architecture in aot.ARCHITECTURES:
        for each in aot.ordered(kernel, architecture):
            key = each.pointers, each.constants, each.num_warps, each.num_stages
            groups.setdefault(key, []).append(each)
    return [Row(kernel, tuple(variants)) for variants in groups.values()]


def line(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], lines: Iterable[str]) -> Iterator[str]:
    """A table, and an empty line after it."""
    yield line(head)
    yield line(["---"] * len(head))
    yield from lines
    yield ""


def costs() -> list[str]:
    """The part that needs no compiler: bytes, FLOPs and time bounds of every op that has kernels."""
    lines = []
    for spec in ALL_SPECS:
        if "triton" in ops.backends(spec.name):
            for direction, moved, flops in directions(spec, cases.CUDA[spec.name]):
                size = " ".join(f"{name}={value}" for name, value in cases.CUDA[spec.name].items())
                bounds = [bound(spec.name, moved, flops, gpu) for gpu in GPUS]
                intensity = f"{flops / moved:.3g}"
                lines.append(line([spec.name, direction, size, scaled(moved), scaled(flops), intensity, *bounds]))
    head = ["op", "", "size", "bytes", "FLOPs", "FLOPs / byte", *(f"{gpu.name} bound" for gpu in GPUS)]
    return list(table(head, lines))


def directions(spec: OpSpec, case: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """(name, bytes, FLOPs) of the forward and, where the spec counts it, of the backward; in bf16 where it may be."""
    size = min(dtype.itemsize for dtype in spec.dtypes)
    yield "forward", spec.bytes(case, size), spec.flops(case)
    if spec.backward_bytes is not None and spec.backward_flops is not None:
        yield "backward", spec.backward_bytes(case, size), spec.backward_flops(case)


def bound(op: str, moved: int, flops: int, gpu: Gpu) -> str:
    """The least time, and what takes it."""
    memory, arithmetic = moved / gpu.bytes, flops / (gpu.fp32 if op in FP32_PRODUCTS else gpu.bf16)
    return f"{seconds(max(memory, arithmetic))}, {'memory' if memory >= arithmetic else 'arithmetic'}"


def scaled(count: float) -> str:
    """12.3 G."""
    for letter, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {letter}"
    return f"{count:.3g}"


def measured() -> str:
    """Where the measured times are."""
    results = sorted((ROOT / "bench" / "results").glob("*/*.json"))
    paths = [path.relative_to(ROOT) for path in results if json.loads(path.read_bytes())["kind"] == "cuda"]
    return "measured times: " + (", ".join(f"`{path}`" for path in paths) if paths else "**not measured**")


HEAD = """# The Triton kernels

Generated by `make docs` (`python -m retinar.bench.kernel_table`); the test suite compares it with the code.

## What a call costs at least

Bytes (every input read once, every output written once) and FLOPs of the specs at GPT-XL's sizes, training in bf16 with
batch 32. A bound is the longer of bytes over memory bandwidth and FLOPs over the dense rate by data sheet: {rates}. The
tensor cores' bf16 rate stands for all but {fp32}, whose products are fp32's. On a GPU, `make gpu` writes measured times
under `bench/results`; {measured}.
"""

RESOURCES = """## What a kernel occupies

Compiled by Triton {triton} for {architectures}; another version of its compiler gives other numbers. Every variant that
a launcher can choose is here, and `Kernel.launch` runs no other: kernel, types of its pointers, constants, warps x
pipeline stages. Then for each architecture registers of a thread; bytes of a thread's stack, where spills would go; KiB
of shared memory of a block; and occupancy, the share of a multiprocessor's {warps} warps that can be resident. A spill
fails the tests, and so do asynchronous matrix products (9.0) that the assembler cannot let overlap.
"""


def preamble() -> str:
    """The page down to the resources."""
    rates = "; ".join(f"{g.name} {g.bf16 / 1e12:.0f} TFLOP/s, {g.bytes / 1e9:,.0f} GB/s" for g in GPUS)
    fp32 = ", ".join(f"`{name}`" for name in sorted(FP32_PRODUCTS))
    return wrapped(HEAD.format(rates=rates, fp32=fp32, measured=measured())) + "\n\n" + "\n".join(costs())


def wrapped(text: str) -> str:
    """Paragraphs in lines of one width."""
    return "\n\n".join(textwrap.fill(each, WIDTH, break_on_hyphens=False) for each in text.strip().split("\n\n"))


def page(kernels: Sequence[aot.Kernel], found: Mapping[tuple[str, aot.Variant], aot.Resources], triton: str) -> str:
    """The whole page, from the resources of every (kernel's name, variant)."""
    names = [f"sm_{architecture}" for architecture in aot.ARCHITECTURES]
    resources = RESOURCES.format(triton=triton, architectures=" and ".join(names), warps=aot.WARPS)
    parts = [preamble(), wrapped(resources), ""]
    numbers = ["registers", "stack", "KiB", "occupancy"]
    split = [f"{name} {number}" if number == "registers" else number for name in names for number in numbers]
    for op, group in itertools.groupby(kernels, key=lambda kernel: kernel.op):
        members = list(group)

        def lines(narrow: bool, members: Sequence[aot.Kernel] = members) -> Iterator[str]:
            for kernel in members:
                for row in rows(kernel):
                    if row.narrow == narrow:
                        yield row.line({variant: found[kernel.name, variant] for variant in row.variants})

        key = ["kernel", "pointers", "constants", "warps x stages"]
        parts += [f"### {op}", "", *table([*key, *split], lines(True))]
        if rest := list(lines(False)):
            joined = [f"{name}: {', '.join(numbers)}" for name in names]
            parts += ["The other dtypes:", "", *table([*key, *joined], rest)]
    return "\n".join(parts).rstrip() + "\n"


def main() -> int:
    """Compile everything, a process for each core, and write the page."""
    import triton

    for architecture in aot.ARCHITECTURES:
        print(f"sm_{architecture}: {precompile(architecture, machine.cores(), Deadline(3600))}", file=sys.stderr)
    kernels = aot.kernels()
    found = {}
    for kernel in kernels:
        for variant in itertools.chain.from_iterable(row.variants for row in rows(kernel)):
            found[kernel.name, variant] = resources = aot.compile_variant(kernel, variant)  # from Triton's cache
            if resources.stack_bytes:
                print(f"{kernel.name} {variant.name()}: {resources.stack_bytes} bytes spilled", file=sys.stderr)
    PAGE.parent.mkdir(exist_ok=True)
    write_text(PAGE, page(kernels, found, triton.__version__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
