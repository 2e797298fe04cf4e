"""One walk over every op: all specs x cases x dtypes x backends, forward and backward, within the error budget.

The backends are those that take CPU tensors; the interpreted run walks those with Triton's kernels alone. Tests that
name no backend cover there what "triton" runs, and in the ordinary run what a CPU prefers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retinar.kernels import dispatch, ops, spec
from retinar.kernels.launch import triton_missing
from retinar.kernels.spec import ALL_SPECS, Case, Inputs, OpSpec

INTERPRETED = "triton", "blas"  # what takes CPU tensors under the interpreter alone


def _name(case: Case) -> str:
    return "-".join(f"{key}{value}" for key, value in case.items())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _takes(op: OpSpec, backend: str) -> tuple[torch.dtype, ...]:
    return tuple(dtype for dtype in op.dtypes if dtype in op.narrow.get(backend, op.dtypes))


def _walk(
    dtypes: Callable[[OpSpec, str], Any] = _takes, cases: Callable[[OpSpec], Any] = lambda op: op.cases
) -> list[Any]:
    """(op, case, dtype, backend) for every backend of every op that takes CPU tensors in this run."""
    found = []
    for op in ALL_SPECS:
        for backend, implementation in dispatch.REGISTRY[op.name].backends.items():
            if "cpu" not in implementation.devices:
                continue
            marks = [pytest.mark.interpreted] if backend in INTERPRETED else []
            for dtype in dtypes(op, backend):
                for case in cases(op):
                    name = f"{op.name}-{backend}-{_dtype(dtype)}-{_name(case)}"
                    found.append(pytest.param(op, case, dtype, backend, id=name, marks=marks))
    return found


def _differentiable(op: OpSpec) -> tuple[Case, ...]:
    return op.cases if op.gradients else ()


def _marks(op: OpSpec) -> list[pytest.MarkDecorator]:
    return [pytest.mark.both_runs] if "triton" in ops.backends(op.name) else []


def _cases(chosen: Callable[[OpSpec], Any] = lambda op: op.cases, marks: Callable[[OpSpec], Any] = _marks) -> list[Any]:
    """(op, case) for tests that name no backend: in both runs where "triton" has the op."""
    return [
        pytest.param(op, case, id=f"{op.name}-{_name(case)}", marks=marks(op))
        for op in ALL_SPECS
        for case in chosen(op)
    ]


def make_inputs(op: OpSpec, case: Case, dtype: torch.dtype) -> Inputs:
    return op.inputs(case, dtype, torch.Generator().manual_seed(7))


def change(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to every floating tensor of (nested) arguments."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: change(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item, function) for item in value))
    return [change(item, function) for item in value] if isinstance(value, list) else value


def truth_of(op: OpSpec, inputs: Inputs) -> tuple[Tensor, ...]:
    widened = change(inputs, lambda t: t.detach().double().requires_grad_(t.requires_grad))
    return op.truth(widened) if op.truth else op.run(widened, "reference")


def require(op: OpSpec, backend: str) -> None:
    """Skips where the machine lacks the backend."""
    reason = ops.backends(op.name)[backend]
    if reason:
        pytest.skip(reason)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every fresh allocation holds NaN (torch's own switch): a result that is not written whole shows."""
    torch.set_deterministic_debug_mode("error")
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def assert_within(actual: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, factor: float) -> None:
    """|actual - truth| <= factor * |plain - truth| + one ulp of the truth's RMS, for the maximum and for the RMS."""
    assert actual.shape == truth.shape
    if not truth.is_floating_point():
        assert torch.equal(actual, truth)
        return
    assert torch.isfinite(actual).all()
    rms = truth.square().mean().sqrt().item()
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(rms)) if rms > 0 else 0.0
    error, allowed = (actual.double() - truth).abs(), (plain.double() - truth).abs()
    assert error.max().item() <= factor * allowed.max().item() + ulp
    assert error.square().mean().sqrt().item() <= factor * allowed.square().mean().sqrt().item() + ulp


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), _walk())
def test_forward(op: OpSpec, case: Case, dtype: torch.dtype, backend: str) -> None:
    require(op, backend)
    inputs = make_inputs(op, case, dtype)
    results = op.run(inputs, backend)
    for actual, plain, truth in zip(results, op.plain(inputs), truth_of(op, inputs), strict=True):
        assert_within(actual, plain, truth.double() if truth.is_floating_point() else truth, dtype, op.budget.forward)


def _refused(op: OpSpec, backend: str) -> list[torch.dtype]:
    return [dtype for dtype in op.dtypes if dtype not in _takes(op, backend)]


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), _walk(_refused, lambda op: op.cases[:1]))
def test_other_dtypes_are_refused(op: OpSpec, case: Case, dtype: torch.dtype, backend: str) -> None:
    require(op, backend)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this call: it takes .* found {dtype}"):
        op.run(make_inputs(op, case, dtype), backend)


def random_cotangents(results: tuple[Tensor, ...]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(11)
    drawn = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in results]
    return [each if result.is_floating_point() else None for each, result in zip(drawn, results, strict=True)]


def gradients(
    op: OpSpec, run: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs, cotangents: list[Tensor | None]
) -> list[Tensor]:
    leaves = {key: inputs[key].detach().requires_grad_() for key in op.gradients}
    results = run({**inputs, **leaves})
    pairs = [(r, c.to(r.dtype)) for r, c in zip(results, cotangents, strict=True) if c is not None]
    return list(torch.autograd.grad([r for r, _ in pairs], list(leaves.values()), [c for _, c in pairs]))


def assert_gradients(
    op: OpSpec, actual: list[Tensor], inputs: Inputs, cotangents: list[Tensor | None], dtype: torch.dtype
) -> None:
    plain = gradients(op, op.plain, inputs, cotangents)
    truth = gradients(op, lambda i: op.run(i, "reference"), change(inputs, lambda t: t.double()), cotangents)
    for name, *each in zip(op.gradients, actual, plain, truth, strict=True):
        assert each[0].dtype == dtype, name
        assert_within(*each, dtype, op.budget.gradient)


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), _walk(cases=_differentiable))
def test_gradients(op: OpSpec, case: Case, dtype: torch.dtype, backend: str) -> None:
    require(op, backend)
    inputs = make_inputs(op, case, dtype)
    cotangents = random_cotangents(op.run(inputs, "reference"))
    actual = gradients(op, lambda i: op.run(i, backend), inputs, cotangents)
    assert_gradients(op, actual, inputs, cotangents, dtype)


def _one_dtype(op: OpSpec, backend: str) -> tuple[torch.dtype, ...]:
    return (torch.float32,)


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), _walk(_one_dtype, _differentiable))
def test_gradients_of_strided_tensors(op: OpSpec, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Inputs and cotangents with gaps of NaN, in memory that holds NaN."""
    require(op, backend)
    inputs = make_inputs(op, case, dtype)
    cotangents = random_cotangents(op.run(inputs, "reference"))
    with poisoned_memory():
        strided = [None if each is None else _strided(each) for each in cotangents]
        actual = gradients(op, lambda i: op.run(i, backend), change(inputs, _strided), strided)
    assert_gradients(op, actual, inputs, cotangents, dtype)


@pytest.mark.parametrize(
    ("op", "case"), _cases(lambda op: _differentiable(op)[:2] if op.name != "vq_lookup" else (), marks=lambda op: [])
)
def test_gradients_are_those_of_the_forward(op: OpSpec, case: Case) -> None:
    """The analytic backwards against finite differences, in fp64: what the budget above takes as truth.

    Not vq_lookup: a straight-through gradient is not the forward's derivative; plain torch is its yardstick above.
    """
    inputs = change(make_inputs(op, case, torch.float32), lambda t: t.double())
    leaves = [inputs[key].requires_grad_() for key in op.gradients]

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = op.run({**inputs, **dict(zip(op.gradients, tensors, strict=True))}, "reference")
        return tuple(r for r in results if r.is_floating_point())

    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)


@pytest.mark.parametrize(("op", "case"), _cases(lambda op: op.cases[1:2]))
def test_dispatch_takes_the_preferred_backend(op: OpSpec, case: Case) -> None:
    """Without a name, a CPU call runs the native backend where there is one (the interpreter where it is on), else
    the reference."""
    available = [name for name, reason in ops.backends(op.name).items() if reason is None]
    preferred = next(name for name in dispatch.preference("cpu") if name in available)
    inputs = make_inputs(op, case, torch.float32)
    for one, other in zip(op.run(inputs, None), op.run(inputs, preferred), strict=True):
        assert torch.equal(one, other)


def _strided(x: Tensor) -> Tensor:
    """The same numbers with a gap after every element and the dimensions in reverse order in memory."""
    reverse = list(range(x.dim()))[::-1]
    out = torch.full((*x.permute(reverse).shape, 2), float("nan"), dtype=x.dtype)[..., 0].permute(reverse)
    return out.copy_(x)


@pytest.mark.parametrize(("op", "case"), _cases())
def test_strides_and_old_memory_change_no_bit(op: OpSpec, case: Case) -> None:
    """Inputs with gaps of NaN, in memory that holds NaN."""
    inputs = make_inputs(op, case, torch.float32)
    expected = op.run(inputs, None)
    with poisoned_memory():
        results = op.run({k: v if "cache" in k else change(v, _strided) for k, v in inputs.items()}, None)
    for one, other in zip(expected, results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("op", "case"), _cases(lambda op: op.cases[1:2]))
def test_opcheck(op: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of schema, fake tensors, autograd and compilation, for every op that the call goes through."""
    calls: dict[str, tuple[dispatch.Op, tuple[Any, ...]]] = {}
    original = dispatch.Op.__call__

    def record(self: dispatch.Op, *args: Any, backend: str | None = None) -> Any:
        calls[self.name] = self, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        return original(self, *args, backend=backend)

    monkeypatch.setattr(dispatch.Op, "__call__", record)
    inputs = make_inputs(op, case, torch.float32)
    inputs.update({key: inputs[key].requires_grad_() for key in op.gradients})
    results = op.run(inputs, None)
    if op.gradients:
        torch.stack([r.sum() for r in results if r.requires_grad]).sum().backward()
    monkeypatch.undo()
    assert calls
    for name, (called, args) in calls.items():
        differentiable = bool(op.gradients) and not name.endswith("_backward")
        args = tuple(
            a.clone().requires_grad_(differentiable and a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in change(list(args), torch.nan_to_num)
        )
        torch.library.opcheck(getattr(torch.ops.retinar, called.name).default, args)


@pytest.mark.parametrize("op", ALL_SPECS, ids=lambda op: op.name)
def test_explicit_backend_never_falls_back(op: OpSpec) -> None:
    inputs = make_inputs(op, op.cases[0], torch.float32)
    with pytest.raises(ValueError, match=r"unknown backend 'magic'; this op has .*reference"):
        op.run(inputs, "magic")


@pytest.mark.both_runs
@pytest.mark.parametrize("op", [op for op in ALL_SPECS if _marks(op)], ids=lambda op: op.name)
def test_triton_runs_or_says_why_not(op: OpSpec) -> None:
    """On CPU tensors: under the interpreter it runs, elsewhere a call that names it is refused in words."""
    reason = ops.backends(op.name)["triton"]
    inputs = make_inputs(op, op.cases[0], torch.float32)
    if dispatch.interpreting():
        assert reason is None
        op.run(inputs, "triton")
        return
    assert reason == (None if torch.cuda.is_available() else "no CUDA device was found") or reason == triton_missing()
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run this call: it runs on cuda, the tensors are on cpu"
    ):
        op.run(inputs, "triton")


@pytest.mark.both_runs
def test_every_folder_with_kernels_is_registered() -> None:
    """A gpu.py whose ops do not have the backend "triton" would never run."""
    root = Path(dispatch.__file__).parent
    folders = {path.parent.name for path in root.glob("*/gpu.py")}
    registered = {
        op.backends["reference"].run.__module__.split(".")[2]
        for op in dispatch.REGISTRY.values()
        if "triton" in op.backends
    }
    assert registered == folders


@pytest.mark.parametrize("op", ALL_SPECS, ids=lambda op: op.name)
def test_costs_are_counted(op: OpSpec) -> None:
    """Bytes and FLOPs are positive, and bytes grow with the element size."""
    for case in op.cases:
        assert op.flops(case) > 0
        assert op.bytes(case, 4) > op.bytes(case, 2) > 0


def test_every_public_op_has_a_spec() -> None:
    """Functions of the facade that take a backend, against the specs."""
    import inspect

    public = {name for name in ops.__all__ if callable(getattr(ops, name)) and not inspect.isclass(getattr(ops, name))}
    with_backend = {name for name in public if "backend" in inspect.signature(getattr(ops, name)).parameters}
    assert with_backend == {op.name.removesuffix("_packed") for op in spec.ALL_SPECS}
