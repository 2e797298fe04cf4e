"""What the kernels are compared with: not kernels of ours, measured in the same run on the same inputs.

A baseline that cannot run is named with its reason, in the result file and in the tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from retinar.bench.baselines import attention, liger, plain
from retinar.bench.baselines.table import Baseline
from retinar.bench.cases import SIZES, directions
from retinar.bench.checks import first_line
from retinar.bench.ops import Measurement, dtype_of
from retinar.kernels.spec import Inputs, OpSpec

BASELINES: tuple[Baseline, ...] = (*plain.BASELINES, *attention.BASELINES, *liger.BASELINES)


class Absent(NamedTuple):
    """A baseline, the op it would stand beside, and why it has no time."""

    baseline: str
    name: str
    reason: str


def baselines(spec: OpSpec) -> Iterator[Baseline]:
    """Those of an op."""
    for each in BASELINES:
        if each.covers(spec):
            yield each


def measurements(spec: OpSpec, device: str, size: str) -> Iterator[Measurement | Absent]:
    """Every baseline of an op in every direction, or why it is absent."""
    for each in baselines(spec):
        reason = each.absent(device, size)
        if reason is None:
            try:
                run = each.make(spec, device, size)
            except Exception as error:  # an installed package that cannot be imported says so
                reason = f"{type(error).__name__}: {first_line(error)}"
        if reason is not None:
            yield Absent(each.name, spec.name, reason)
            continue
        dtype = dtype_of(spec, size)
        for direction in directions(spec):
            yield Measurement(spec, SIZES[size][spec.name], dtype, each.name, run, device, direction, baseline=True)


def disagrees(what: Measurement, inputs: Inputs) -> str | None:
    """Why a baseline's time would mislead: it does not compute what plain torch computes from these inputs.

    Compared loosely (5 % of the norm): its accuracy is not ours to judge. Those that by design compute less, or draw
    another dropout mask, are not compared.
    """
    baseline = next(each for each in BASELINES if each.name == what.name)
    if not baseline.same or what.spec.name.endswith("_dropout"):
        return None
    with torch.no_grad():
        expected = plain.eager(what.spec, what.device)(inputs)
        for index, (one, other) in enumerate(zip(what.run(inputs), expected, strict=True)):
            if one.shape != other.shape:
                return f"result {index} has shape {list(one.shape)}, plain torch's {list(other.shape)}"
            if one.is_floating_point():
                error = float((one.double() - other.double()).norm() / other.double().norm())
                if not error <= 0.05:
                    return f"result {index} differs from plain torch's by {error:.2g} of its norm"
    return None
