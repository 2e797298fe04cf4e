"""Every op with every implementation that runs here, forward and backward: what is timed, and what it must move.

Directions: *forward* runs without autograd. *backward* is ``torch.autograd.grad`` over the graph of one forward that
is kept, so the forward is not in it; on a GPU autograd's work on the host is hidden (see `timing`). *both* is a forward
under autograd and its backward, as in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retinar.bench.arguments import clone, to_device
from retinar.bench.cases import DTYPES, FIRST, LEFT_OUT, SIZES, Direction, directions
from retinar.bench.checks import Trial, check, name_of, runnable
from retinar.bench.timing import Limits, Timing, allowed, copies, measure, peak_bytes
from retinar.bench.variants import BENCHED
from retinar.kernels import ops
from retinar.kernels.spec import Case, Inputs, OpSpec

Call = Callable[[], object]
Run = Callable[[Inputs], tuple[Tensor, ...]]


@functools.cache
def _seed(device: torch.device) -> Tensor:
    """Where training has it: a number from the host would make every call wait for the device."""
    with torch.inference_mode(False):  # it is saved for backwards later
        return torch.full((), 11, dtype=torch.int64, device=device)


def _attention(i: Inputs, backend: str) -> tuple[Tensor]:
    settings = {"dropout_p": i["dropout_p"], "seed": _seed(i["rope"].device), "backend": backend}
    if "qkv" in i:
        return (ops.rope_attention(i["qkv"], None, None, i["rope"], heads=i["heads"], **settings),)
    return (ops.rope_attention(i["q"], i["k"], i["v"], i["rope"], **settings),)


def _paged_attention(i: Inputs, backend: str) -> tuple[Tensor]:
    """Without the copies of the caches that the spec makes to return what was written: writing the same slot again and
    again changes no result."""
    caches = i["k_cache"], i["v_cache"], i["block_table"]
    return (ops.paged_attention(i["q"], i["k"], i["v"], *caches, i["positions"], i["rope"], backend=backend),)


# Called otherwise than the specs do, who run each call once.
_TIMED: Mapping[str, Callable[[Inputs, str], tuple[Tensor, ...]]] = {
    "rope_attention": _attention,
    "rope_attention_packed": _attention,
    "rope_attention_dropout": _attention,
    "paged_attention": _paged_attention,
}


@dataclass(frozen=True)
class Measurement:
    """One op at one size with one implementation in one direction on one device ("cpu", "cuda").

    ``name``: the backend, or the baseline; ``run``: calls it.
    """

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    name: str
    run: Run
    device: str
    direction: Direction = "forward"
    baseline: bool = False

    @property
    def id(self) -> str:
        """For test ids and notes."""
        return f"{self.spec.name}-{self.direction}-{self.name.replace(' ', '_')}"

    @property
    def group(self) -> tuple[str, str]:
        """Spec and implementation: what a check passes or fails."""
        return self.spec.name, self.name

    def costs(self) -> list[tuple[int, int]]:
        """(bytes, FLOPs) of each part; empty where the spec does not count them."""
        size, spec = self.dtype.itemsize, self.spec
        parts = []
        if self.direction != "backward":
            parts.append((spec.bytes(self.case, size), spec.flops(self.case)))
        if self.direction != "forward":
            if spec.backward_bytes is None or spec.backward_flops is None:
                return []
            parts.append((spec.backward_bytes(self.case, size), spec.backward_flops(self.case)))
        return parts

    def inputs(self, most: int | None = None) -> list[Inputs]:
        """So many copies of the inputs that their turns find the cache cold (``most`` bounds them)."""
        count = copies(self.spec.bytes(self.case, self.dtype.itemsize))
        first = to_device(self.spec.inputs(self.case, self.dtype, torch.Generator().manual_seed(0)), self.device)
        return [first, *(clone(first) for _ in range(min(count, most or count) - 1))]

    def calls(self, inputs: Sequence[Inputs]) -> list[Call]:
        """One call for each of the inputs."""
        make = {"forward": self._forward, "backward": self._backward, "both": self._both}[self.direction]
        return [make(each) for each in inputs]

    def _forward(self, inputs: Inputs) -> Call:
        def call() -> object:
            with torch.inference_mode():
                return self.run(inputs)

        return call

    def _backward(self, inputs: Inputs) -> Call:
        leaves, results = self._graph(inputs)
        cotangents = [_cotangent(each) for each in results]
        return lambda: torch.autograd.grad(results, leaves, cotangents, retain_graph=True)

    def _both(self, inputs: Inputs) -> Call:
        cotangents = [_cotangent(each) for each in self._graph(inputs)[1]]

        def call() -> object:
            leaves, results = self._graph(inputs)
            return torch.autograd.grad(results, leaves, cotangents)

        return call

    def _graph(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        leaves = {key: inputs[key].detach().requires_grad_() for key in self.spec.gradients}
        results = self.run({**inputs, **leaves})
        return list(leaves.values()), [each for each in results if each.requires_grad]

    def row(self, timing: Timing, limit: Limits, peak: int | None = None) -> dict[str, object]:
        """A line of a result file. ``share``: the time that the limits allow over the time taken."""
        parts = self.costs()
        least = sum(allowed(moved, flops, limit) for moved, flops in parts)
        moved, flops = sum(part[0] for part in parts), sum(part[1] for part in parts)
        return {
            "name": self.spec.name,
            "direction": self.direction,
            "case": " ".join(f"{name}={value}" for name, value in self.case.items()),
            "dtype": name_of(self.dtype),
            "backend": self.name,
            "baseline": self.baseline,
            "seconds": timing.median,
            "fastest": timing.fastest,
            "slowest": timing.slowest,
            "runs": timing.runs,
            "queued": timing.queued,
            "bytes": moved if parts else None,
            "flops": flops if parts else None,
            "share": least / timing.median if parts else None,
            "peak_bytes": peak,
        }


def _cotangent(result: Tensor) -> Tensor:
    """Ones for a loss, as ``backward()`` has it; else random numbers."""
    return torch.ones_like(result) if result.dim() == 0 else torch.randn_like(result)


def measurements_of(spec: OpSpec, device: str, size: str) -> Iterator[Measurement]:
    """An op with every backend that this device runs, at a size (a key of `SIZES`), forward and backward."""
    dtype = dtype_of(spec, size)
    for backend in runnable(spec, device, dtype):
        if (size, spec.name, backend) not in LEFT_OUT:
            run = backend_run(spec, backend)
            for direction in directions(spec):
                yield Measurement(spec, SIZES[size][spec.name], dtype, backend, run, device, direction)


def specs(only: str | None = None) -> list[OpSpec]:
    """What is timed, `FIRST` first."""
    chosen = [spec for spec in BENCHED if only is None or only in spec.name]
    return sorted(chosen, key=lambda spec: FIRST.index(spec.name) if spec.name in FIRST else len(FIRST))


def dtype_of(spec: OpSpec, size: str) -> torch.dtype:
    """The dtype that an op is timed in."""
    wanted = getattr(torch, DTYPES[size])
    return wanted if wanted in spec.dtypes else torch.float32


def backend_run(spec: OpSpec, backend: str) -> Run:
    """The call of a backend."""
    run = _TIMED.get(spec.name, spec.run)
    return lambda inputs: run(inputs, backend)


def time_op(
    what: Measurement, limit: Limits, inputs: Sequence[Inputs] | None = None, seconds: float = 0.3, least: int = 5
) -> dict[str, object]:
    """Measure one op and return its line; with the peak memory where a forward and its backward are measured."""
    calls = what.calls(what.inputs() if inputs is None else inputs)
    timing = measure(calls, what.device, seconds=seconds, least=least)
    peak = peak_bytes(calls[0], what.device) if what.direction == "both" else None
    return what.row(timing, limit, peak)


def check_cases(what: Measurement) -> str | None:
    """What is wrong with a backend in the dtype that is timed, over all cases of its spec, or None."""
    for case in what.spec.cases:
        wrong = check(Trial(what.spec, case, what.dtype, what.name, what.device))
        if wrong is not None:
            return wrong
    return None
