"""Every op with every backend that runs here: what is timed, what it must move and compute, and whether it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retinar.bench.cases import DTYPES, SIZES
from retinar.bench.timing import Limits, Timing, copies, measure, share
from retinar.kernels import ops
from retinar.kernels.spec import ALL_SPECS, Case, Inputs, OpSpec

Call = Callable[[], object]

# Timed without the copies of the caches that their specs make to return what was written. Writing the same slot again
# and again changes no result.
_IN_PLACE: Mapping[str, Callable[[Inputs, str], object]] = {
    "paged_attention": lambda i, backend: ops.paged_attention(
        i["q"], i["k"], i["v"], i["k_cache"], i["v_cache"], i["block_table"], i["positions"], i["rope"], backend=backend
    ),
}


@dataclass(frozen=True)
class Measurement:
    """One op at one size with one backend on one device ("cpu", "cuda")."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    backend: str
    device: str

    @property
    def id(self) -> str:
        return f"{self.spec.name}-{self.backend}"

    def bytes(self) -> int:
        return self.spec.bytes(self.case, self.dtype.itemsize)

    def flops(self) -> int:
        return self.spec.flops(self.case)

    def calls(self, most: int | None = None) -> list[Call]:
        """Equal calls on so many copies of the inputs that their turns find the cache cold (``most`` bounds them)."""
        count = copies(self.bytes())
        generator = torch.Generator().manual_seed(0)
        first = to_device(self.spec.inputs(self.case, self.dtype, generator), self.device)
        inputs = [first, *(_clone(first) for _ in range(min(count, most or count) - 1))]
        run = _IN_PLACE.get(self.spec.name, self.spec.run)
        return [lambda each=each: run(each, self.backend) for each in inputs]  # type: ignore[misc]

    def row(self, timing: Timing, limit: Limits) -> dict[str, object]:
        """A line of a result file."""
        moved, flops = self.bytes(), self.flops()
        return {
            "name": self.spec.name,
            "case": " ".join(f"{name}={value}" for name, value in self.case.items()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend,
            "seconds": timing.median,
            "fastest": timing.fastest,
            "slowest": timing.slowest,
            "runs": timing.runs,
            "bytes": moved,
            "flops": flops,
            "share": share(timing.median, moved, flops, limit),
        }


def measurements(device: str) -> Iterator[Measurement]:
    """Every op with every backend that this device runs, at the size for it."""
    for spec in ALL_SPECS:
        wanted = getattr(torch, DTYPES[device])
        dtype = wanted if wanted in spec.dtypes else torch.float32
        for backend in runnable(spec, device, dtype):
            yield Measurement(spec, SIZES[device][spec.name], dtype, backend, device)


def runnable(spec: OpSpec, device: str, dtype: torch.dtype) -> list[str]:
    """Backends that take the op's first case on this device in this dtype."""
    inputs = to_device(spec.inputs(spec.cases[0], dtype, torch.Generator().manual_seed(0)), device)
    found = []
    for backend, reason in ops.backends(spec.name).items():
        if reason is None and dtype in spec.narrow.get(backend, spec.dtypes):
            try:
                spec.run(inputs, backend)
            except ValueError:  # a backend of another device says so in these words
                continue
            found.append(backend)
    return found


def time_op(what: Measurement, limit: Limits, seconds: float = 0.3) -> dict[str, object]:
    """Measure one op and return its line."""
    with torch.inference_mode():
        return what.row(measure(what.calls(), what.device, seconds=seconds), limit)


def check(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str) -> str | None:
    """None when the forward is within the spec's error budget on this device, else a sentence.

    Truth and the yardstick (plain torch in the same dtype) are computed on the CPU from the same inputs.
    """
    inputs = spec.inputs(case, dtype, torch.Generator().manual_seed(7))
    wide = _map(inputs, lambda t: t.double() if t.is_floating_point() else t)
    truths = spec.truth(wide) if spec.truth is not None else spec.run(wide, "reference")
    where = f"{spec.name} {dict(case)} {dtype} {backend} on {device}"
    results = spec.run(to_device(inputs, device), backend)
    for index, (result, plain, truth) in enumerate(zip(results, spec.plain(inputs), truths, strict=True)):
        result = result.cpu()
        if result.shape != truth.shape:
            return f"{where}: result {index} has shape {list(result.shape)}, expected {list(truth.shape)}"
        if not truth.is_floating_point():
            if not torch.equal(result, truth):
                return f"{where}: result {index} differs in {int((result != truth).sum())} of {truth.numel()} places"
            continue
        rms = truth.square().mean().sqrt().item()
        ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(rms)) if rms > 0 else 0.0
        error, allowed = (result.double() - truth).abs(), (plain.double() - truth).abs()
        for kind, of in (("largest", Tensor.max), ("RMS", lambda t: t.square().mean().sqrt())):
            found, bound = of(error).item(), spec.budget.forward * of(allowed).item() + ulp
            if not found <= bound:
                return f"{where}: the {kind} error of result {index} is {found:.3g}, allowed are {bound:.3g}"
    return None


def to_device(value: Any, device: str) -> Any:
    """(Nested) arguments on a device."""
    return _map(value, lambda tensor: tensor.to(device))


def _clone(value: Any) -> Any:
    return _map(value, Tensor.clone)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, function) for item in value))
    return [_map(item, function) for item in value] if isinstance(value, list) else value
