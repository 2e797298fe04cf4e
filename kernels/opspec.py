"""What a spec says about an op: how to call it, how far it may be off, and what it costs at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Case = Mapping[str, int]
Inputs = dict[str, Any]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ErrorBudget:
    """An implementation's error, against the reference in fp64, is at most ``factor`` times that of plain torch in the
    inputs' dtype, plus one ulp of the truth's RMS; the maximum and the RMS of the error are both held to it."""

    forward: float = 2.0
    gradient: float = 3.0


@dataclass(frozen=True)
class OpSpec:
    """One op, for tests, benchmarks and meters.

    Attributes:
        name: of the public function and of ``ops.backends``.
        cases: named sizes to try; odd, prime and size-1 ones among them.
        device_cases: more of them, too large for Triton's interpreter: sizes whose binaries and loops the small ones do
            not reach. `retinar.bench` checks them on a GPU.
        dtypes: floating dtypes of the inputs. Integer results are compared bit by bit, others within the budget.
        inputs: (case, dtype, generator) -> arguments on the CPU; floating ones carry the dtype.
        run: (arguments, backend) -> results of the public function. Caches that it writes are results too.
        plain: the same in plain torch, in the inputs' dtype: the yardstick of the error budget.

        gradients: names of the arguments that get gradients.
        bytes: (case, bytes per element) -> bytes that the forward must move at least: inputs once, outputs once.
        flops: case -> floating point operations of the forward, a multiply-add counting two.
        backward_bytes: as ``bytes``, of the backward alone: the results' gradients and what it needs of the forward
            read once, the arguments' gradients written once. None without gradients, or not counted.
        backward_flops: as ``flops``, of the backward alone. Where the forward's values are too large to keep, what it
            takes to compute them again counts (attention's scores; not the loss's logits: see its spec).
        truth: (arguments widened to fp64) -> results; None where the reference itself runs in fp64.
        narrow: backends that take only some of the dtypes.
        budget: the error allowed.
    """

    name: str
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...]
    inputs: Callable[[Case, torch.dtype, torch.Generator], Inputs]
    run: Callable[[Inputs, str | None], tuple[Tensor, ...]]
    plain: Callable[[Inputs], tuple[Tensor, ...]]
    bytes: Callable[[Case, int], int]
    flops: Callable[[Case], int]
    backward_bytes: Callable[[Case, int], int] | None = None
    backward_flops: Callable[[Case], int] | None = None
    gradients: tuple[str, ...] = ()
    truth: Callable[[Inputs], tuple[Tensor, ...]] | None = None
    narrow: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    device_cases: tuple[Case, ...] = ()
    budget: ErrorBudget = ErrorBudget()


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, rounded to the dtype."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)
