"""Is an op right on this device? Forward and gradients within the spec's budget, whole outputs, the same bits twice.

Truth (the reference in fp64) and the yardstick (plain torch in the same dtype) are computed on the CPU from the same
inputs. Every check returns None or a sentence.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from retinar.bench.arguments import change, strided, to_device, widen
from retinar.bench.variants import op_of
from retinar.kernels import ops
from retinar.kernels.spec import Case, Inputs, OpSpec

Run = Callable[[Inputs], tuple[Tensor, ...]]
FOREIGN = ("sdpa", "flash")
"""Backends whose kernels are not ours: they are held to the budget, but promise no bits."""


@dataclass(frozen=True)
class Trial:
    """One case of an op in one dtype, with what it is compared to; ``backend`` runs on ``device``."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    backend: str | None
    device: str

    @cached_property
    def inputs(self) -> Inputs:
        return self.spec.inputs(self.case, self.dtype, torch.Generator().manual_seed(7))

    @cached_property
    def truths(self) -> tuple[Tensor, ...]:
        wide = widen(self.inputs)
        return self.spec.truth(wide) if self.spec.truth is not None else self.spec.run(wide, "reference")

    @cached_property
    def plain(self) -> tuple[Tensor, ...]:
        return self.spec.plain(self.inputs)

    @cached_property
    def cotangents(self) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(11)
        return [
            torch.randn(each.shape, generator=generator) if each.is_floating_point() else None for each in self.truths
        ]

    @cached_property
    def true_gradients(self) -> list[Tensor]:
        return self.gradients(lambda i: self.spec.run(i, "reference"), widen(self.inputs))

    @cached_property
    def plain_gradients(self) -> list[Tensor]:
        return self.gradients(self.spec.plain, self.inputs)

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.spec.run(inputs, self.backend)

    def gradients(self, run: Run, inputs: Inputs) -> list[Tensor]:
        """Gradients of the spec's arguments, on the inputs' device; layout and dtype of the inputs are kept."""
        leaves = {key: inputs[key].detach().requires_grad_() for key in self.spec.gradients}
        results = run({**inputs, **leaves})
        pairs = [
            (each, cotangent.to(self.dtype).to(each.device, each.dtype))
            for each, cotangent in zip(results, self.cotangents, strict=True)
            if cotangent is not None
        ]
        return list(torch.autograd.grad([r for r, _ in pairs], list(leaves.values()), [c for _, c in pairs]))

    def everything(self, inputs: Inputs) -> list[Tensor]:
        """Results and gradients of the backend."""
        gradients = self.gradients(self.run, inputs) if self.spec.gradients else []
        return [*(each.detach() for each in self.run(inputs)), *gradients]

    def __str__(self) -> str:
        size = " ".join(f"{name}={value}" for name, value in self.case.items())
        return f"{self.spec.name} ({size}, {name_of(self.dtype)}, {self.backend or 'default'} on {self.device})"


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def within(result: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, factor: float) -> str | None:
    """None when the error is at most ``factor`` times plain torch's, plus one ulp of the truth's RMS: both the largest
    error and the RMS. Integers must be equal."""
    result = result.detach().cpu()
    if result.shape != truth.shape:
        return f"has shape {list(result.shape)}, expected {list(truth.shape)}"
    if not truth.is_floating_point():
        wrong = int((result != truth).sum())
        return f"differs in {wrong} of {truth.numel()} places" if wrong else None
    truth = truth.double()
    rms = truth.square().mean().sqrt().item()
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(rms)) if rms > 0 else 0.0
    error, allowed = (result.double() - truth).abs(), (plain.detach().double() - truth).abs()
    for kind, of in (("largest", Tensor.max), ("RMS", lambda t: t.square().mean().sqrt())):
        found, bound = of(error).item(), factor * of(allowed).item() + ulp
        if not found <= bound:  # so that NaN does not pass
            return f"has a {kind} error of {found:.3g}, allowed are {bound:.3g}"
    return None


def forward(trial: Trial, *, gaps: bool = False) -> str | None:
    """The results within the budget; with ``gaps`` from inputs of awkward strides."""
    inputs = to_device(trial.inputs, trial.device)
    results = trial.run(strided(inputs) if gaps else inputs)
    for index, each in enumerate(zip(results, trial.plain, trial.truths, strict=True)):
        wrong = within(*each, trial.dtype, trial.spec.budget.forward)
        if wrong is not None:
            return f"result {index}{' from strided inputs' * gaps} {wrong}"
    return None


def gradients(trial: Trial, *, gaps: bool = False) -> str | None:
    """The gradients within the budget."""
    if not trial.spec.gradients:
        return None
    inputs = to_device(trial.inputs, trial.device)
    found = trial.gradients(trial.run, strided(inputs) if gaps else inputs)
    all_of = zip(trial.spec.gradients, found, trial.plain_gradients, trial.true_gradients, strict=True)
    for name, result, plain, truth in all_of:
        wrong = within(result, plain, truth, trial.dtype, trial.spec.budget.gradient)
        if result.dtype != trial.dtype:
            wrong = f"is {name_of(result.dtype)}"
        if wrong is not None:
            return f"the gradient of {name}{' from strided inputs' * gaps} {wrong}"
    return None


def bits(trial: Trial) -> str | None:
    """Whole outputs, the same bits twice: fresh memory is filled with NaN in one of two runs."""
    if trial.backend in FOREIGN:
        return None
    inputs = to_device(trial.inputs, trial.device)
    with deterministic(poison=False):
        clean = trial.everything(inputs)
    with deterministic(poison=True):
        poisoned = trial.everything(inputs)
    with deterministic(poison=False):
        again = trial.everything(inputs)
    names = [f"result {index}" for index in range(len(clean) - len(trial.spec.gradients))]
    names += [f"the gradient of {name}" for name in trial.spec.gradients]
    for name, *three in zip(names, clean, poisoned, again, strict=True):
        one, filled, two = (each.cpu() for each in three)
        if not torch.equal(one, two):
            return f"{name} has other bits in a second run"
        if not torch.equal(one, filled):
            return f"{name} depends on what fresh memory holds"
    return None


@contextmanager
def deterministic(*, poison: bool) -> Iterator[None]:
    """torch's deterministic algorithms where it has them, and its switch that fills fresh memory with NaN.

    Both runs of a comparison need them: torch takes other kernels when they are on.
    """
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = poison
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)
        switch.fill_uninitialized_memory = fill


ALL: Sequence[Callable[[Trial], str | None]] = (
    forward,
    gradients,
    lambda trial: forward(trial, gaps=True),
    lambda trial: gradients(trial, gaps=True),
    bits,
)


def check(trial: Trial) -> str | None:
    """The first thing that is wrong with it, or None. What an op raises is wrong too."""
    try:
        for each in ALL:
            wrong = each(trial)
            if wrong is not None:
                return f"{trial}: {wrong}"
    except Exception as error:
        return f"{trial}: {type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """What an error says, without its traceback."""
    return (str(error).strip().splitlines() or [""])[0]


def runnable(spec: OpSpec, device: str, dtype: torch.dtype) -> list[str]:
    """Backends that take this dtype on this device, by asking them with the op's first case.

    One that fails otherwise counts: the checks will say how it fails.
    """
    inputs = to_device(spec.inputs(spec.cases[0], dtype, torch.Generator().manual_seed(0)), device)
    found = []
    for backend, reason in ops.backends(op_of(spec)).items():
        if reason is not None or dtype not in spec.narrow.get(backend, spec.dtypes):
            continue
        try:
            spec.run(change(inputs, Tensor.clone), backend)
        except ValueError:  # "backend ... cannot run this call": another device, or dropout that it does not have
            continue
        except Exception:
            pass
        found.append(backend)
    return found
