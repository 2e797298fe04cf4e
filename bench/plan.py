"""Everything that one run measures: our backends and the baselines, op by op."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from retinar.bench import ops
from retinar.bench.baselines import kernels as baselines
from retinar.bench.baselines.kernels import Absent
from retinar.bench.cases import SIZES
from retinar.bench.ops import Measurement


def plan(device: str, size: str | None = None, only: str | None = None) -> Iterator[Measurement | Absent]:
    """Measurements at a size (a key of `cases.SIZES`; None: the device's), and the baselines that cannot run.

    All of one op come together, so that its inputs are made once; it is lazy, since a baseline may compile.
    """
    size = size or device
    for spec in ops.specs(only):
        if spec.name not in SIZES[size]:
            continue
        forget_compiled()
        yield from ops.measurements_of(spec, device, size)
        yield from baselines.measurements(spec, device, size)


def forget_compiled() -> None:
    """Every op starts with no compiled code: all of them compile the same few Python functions, and torch gives up on
    one that is compiled too often."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
