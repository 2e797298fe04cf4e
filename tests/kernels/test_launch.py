"""No launcher can choose a configuration that is not compiled in tests/kernels/test_aot.py.

`Kernel.launch` refuses what its table lacks; here launchers are made to choose, for shapes, dtypes and strides of all
kinds and for both architectures. The kernels themselves do not run for that: their choice depends on arguments alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinar.bench import cases
from retinar.bench.arguments import to_device
from retinar.kernels import aot, launch, ops
from retinar.kernels.launch import ARCHITECTURES, Kernel, Variant, aligned
from retinar.kernels.spec import ALL_SPECS, OpSpec

interpreted = pytest.mark.interpreted
SPECS = {op.name: op for op in ALL_SPECS if "triton" in ops.backends(op.name)}


class Spy:
    """Stands for a compiled function: notes the launches."""

    __name__ = "_spy"

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **constants: Any) -> None:
            assert all(0 < size < 2**31 for size in grid[:1]), grid
            assert all(0 < size < 2**16 for size in grid[1:]), grid  # CUDA's limit of the second and third dimension
            self.launches.append((grid, arguments, constants))

        return run


@pytest.fixture
def kernel() -> Kernel:
    return Kernel("spy", Spy(), lambda each: [Variant(each, ("fp32", "bf16"), (("A", 1), ("B", True)), 4, 2)])


X, Y, CONSTANTS = torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16), {"A": 1, "B": True}


def test_a_declared_variant_is_launched(kernel: Kernel) -> None:
    kernel.launch((3, 2), (X, 7, Y, 0.5), CONSTANTS, 4, 2)
    assert kernel.function.launches == [((3, 2), (X, 7, Y, 0.5), {**CONSTANTS, "num_warps": 4, "num_stages": 2})]


@pytest.mark.parametrize(
    ("arguments", "constants", "warps", "stages"),
    [
        ((X, Y), {**CONSTANTS, "A": 2}, 4, 2),
        ((X, Y), {"A": 1}, 4, 2),
        ((X, Y), {**CONSTANTS, "C": 1}, 4, 2),
        ((X, Y), {"B": True, "A": 1}, 4, 2),
        ((X, Y), CONSTANTS, 8, 2),
        ((X, Y), CONSTANTS, 4, 1),
        ((X, X), CONSTANTS, 4, 2),
        ((Y, X), CONSTANTS, 4, 2),
        ((X,), CONSTANTS, 4, 2),
        ((X, Y, Y), CONSTANTS, 4, 2),
    ],
    ids=["constant", "fewer", "more", "order", "warps", "stages", "dtype", "dtypes", "pointers", "too many"],
)
def test_anything_else_is_refused(kernel: Kernel, arguments: Any, constants: Any, warps: int, stages: int) -> None:
    with pytest.raises(RuntimeError, match="spy: no such variant was declared"):
        kernel.launch((1,), arguments, constants, warps, stages)
    assert kernel.function.launches == []


def test_another_architecture_is_refused(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: 75)
    with pytest.raises(RuntimeError, match="no such variant was declared: sm_75"):
        kernel.launch((1,), (X, Y), CONSTANTS, 4, 2)


@pytest.mark.parametrize("which", [0, 1])
def test_an_unaligned_pointer_is_refused(kernel: Kernel, which: int) -> None:
    arguments = [X, Y]
    arguments[which] = torch.zeros(9, dtype=arguments[which].dtype)[1:]
    with pytest.raises(RuntimeError, match="spy: a pointer is not aligned to 16 bytes"):
        kernel.launch((1,), tuple(arguments), CONSTANTS, 4, 2)
    arguments[which] = aligned(arguments[which])
    kernel.launch((1,), tuple(arguments), CONSTANTS, 4, 2)


def test_aligned_copies_only_where_it_must() -> None:
    x = torch.arange(64.0).view(8, 8)
    assert aligned(x) is x and aligned(x.t()).data_ptr() == x.data_ptr()
    odd = torch.arange(65.0)[1:].view(8, 8).t()
    assert aligned(odd).data_ptr() % 16 == 0 and aligned(odd).stride() == odd.stride()
    assert torch.equal(aligned(odd), odd)


def _gaps(x: Tensor) -> Tensor:
    """A gap after every element, the dimensions in reverse order in memory."""
    reverse = list(range(x.dim()))[::-1]
    return x.new_zeros(*x.permute(reverse).shape, 2)[..., 0].permute(reverse).copy_(x)


def _wider_rows(x: Tensor) -> Tensor:
    """Rows of a wider tensor, as the halves of a packed one are."""
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)[..., : x.shape[-1]].copy_(x) if x.dim() else x


def _swapped(x: Tensor) -> Tensor:
    """[B, H, N, D] over the memory of [B, N, H, D]: what a packed projection gives."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 2 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "gaps": _gaps,
    "wider rows": _wider_rows,
    "swapped": _swapped,
    "offset": lambda x: x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x),
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() > 1 else x,
}


@pytest.fixture(scope="module")
def launched() -> Iterator[set[tuple[str, Variant]]]:
    """Every (kernel, variant) launched, while no kernel runs. Integer results are zeros: valid indices."""
    compiled = {kernel.name: kernel for kernel in aot.kernels()}
    found: set[tuple[str, Variant]] = set()
    enforce = Kernel.launch

    def launch_and_note(
        self: Kernel, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Any, *shape: int, **named: int
    ) -> None:
        assert compiled.get(self.name) is self, f"{self.name} is not among its folder's KERNELS: it is not compiled"
        before = len(self.function.launches)
        enforce(self, grid, arguments, constants, *shape, **named)
        _, _, options = self.function.launches[before]
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        pointers = tuple(launch.TYPES[each.dtype] for each in tensors)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        chosen = launch.architecture(tensors[0].device)
        variant = Variant(chosen, pointers, tuple(options.items()), warps, stages)
        assert variant in self.variants[chosen], f"{self.name} {variant.name()} is not compiled"
        found.add((self.name, variant))
        for each in tensors:
            if not each.is_floating_point():
                each.zero_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", launch_and_note)
        patch.setattr(
            launch, "kernel_dtypes", lambda products=False: launch.FLOATS
        )  # no kernel runs: bf16 is no matter
        for kernel in compiled.values():
            patch.setattr(kernel, "function", Spy())
        yield found


@pytest.fixture(params=ARCHITECTURES, ids=lambda each: f"sm_{each}")
def architecture(request: pytest.FixtureRequest, launched: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Makes the launchers choose for an architecture, whichever modules have imported the function that says it."""
    asked = launch.architecture
    for name, module in list(sys.modules.items()):
        if name.startswith("retinar.kernels") and getattr(module, "architecture", None) is asked:
            monkeypatch.setattr(module, "architecture", lambda device: request.param)
    return request.param


def call(op: OpSpec, inputs: dict[str, Any], gradients: bool, cotangent: Callable[[Tensor], Tensor]) -> None:
    """The public function on the backend "triton", and its backward with cotangents of a layout."""
    if gradients and op.gradients:
        inputs = {**inputs, **{key: inputs[key].detach().requires_grad_() for key in op.gradients}}
    results = [each for each in op.run(inputs, "triton") if each.requires_grad]
    if results:
        leaves = [each for each in inputs.values() if isinstance(each, Tensor) and each.requires_grad]
        cotangents = [cotangent(torch.zeros(each.shape, dtype=each.dtype)) for each in results]
        torch.autograd.grad(results, leaves, cotangents, allow_unused=True)


def shapes(op: OpSpec) -> st.SearchStrategy[dict[str, int]]:
    """Cases like the spec's: each number from there, or any up to their maximum in steps of what they share."""

    def number(key: str) -> st.SearchStrategy[int]:
        given = [case[key] for case in op.cases if key in case]
        step = math.gcd(*given) or 1
        some = st.integers(1, max(max(given) // step, 1)).map(lambda count: count * step)
        return st.sampled_from(given) | some

    return st.fixed_dictionaries({key: number(key) for key in op.cases[0]})


@interpreted
@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_launchers_stay_in_their_tables(name: str, architecture: int, data: st.DataObject) -> None:
    op = SPECS[name]
    case = data.draw(shapes(op), label="case")
    dtype = data.draw(st.sampled_from(op.dtypes), label="dtype")
    try:
        inputs = op.inputs(case, dtype, torch.Generator())
        tensors = [key for key, each in inputs.items() if isinstance(each, Tensor)]
        if data.draw(st.integers(0, 3), label="mixed dtypes") == 0:
            key = data.draw(st.sampled_from([key for key in tensors if inputs[key].is_floating_point()]), label="other")
            inputs[key] = inputs[key].to(data.draw(st.sampled_from(launch.FLOATS), label="its dtype"))
        if "dropout_p" in inputs:
            inputs["dropout_p"] = data.draw(st.sampled_from([0.0, 0.1, 0.9]), label="dropout_p")
        op.run(to_device(inputs, "meta"), None)
    except ValueError:  # sizes that do not fit together, such as heads and groups; dtypes that may not be mixed
        return
    free = [key for key in tensors if "cache" not in key]  # which the op writes, and takes as they are made
    layouts = {key: data.draw(st.sampled_from(list(LAYOUTS)), label=key) for key in free}
    changed = {**inputs, **{key: LAYOUTS[layout](inputs[key]) for key, layout in layouts.items()}}
    gradients = data.draw(st.booleans(), label="gradients")
    cotangent = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)), label="cotangent")]
    call(op, changed, gradients, cotangent)


def training_size(op: OpSpec) -> dict[str, int]:
    """What the benchmarks time, with fewer rows where torch's own products between the kernels would take minutes."""
    case = dict(cases.CUDA[op.name])
    rows = next(key for key in ("rows", "tokens", "batch", "vectors", "images") if key in case)
    while op.flops(case) > 2**33:
        case[rows] //= 2
    return case


@interpreted
def test_every_kernel_is_reached(
    architecture: int, launched: set[tuple[str, Variant]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the cases of the specs and the sizes of training, on each architecture: no kernel is dead."""
    launched.clear()
    for op in SPECS.values():
        for case in op.cases:
            for dtype in op.dtypes:
                call(op, op.inputs(case, dtype, torch.Generator()), True, LAYOUTS["contiguous"])
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None: torch.empty(shape))  # nobody reads them
    for op in SPECS.values():
        dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
        call(op, op.inputs(training_size(op), dtype, torch.Generator()), True, LAYOUTS["contiguous"])
    reached = {name for name, variant in launched if variant.architecture == architecture}
    assert reached == {kernel.name for kernel in aot.kernels()}
