"""A line of the table of baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from retinar.kernels.spec import Inputs, OpSpec

Run = Callable[[Inputs], tuple[Tensor, ...]]


class Baseline(NamedTuple):
    """``names``: the specs that it stands beside, None for all of them.

    absent: (device, size) -> why it cannot run, or None. make: (spec, device, size) -> its call, on the spec's
    arguments and with the spec's results. same: whether it computes all that the op does.
    """

    name: str
    names: tuple[str, ...] | None
    absent: Callable[[str, str], str | None]
    make: Callable[[OpSpec, str, str], Run]
    same: bool = True

    def covers(self, spec: OpSpec) -> bool:
        return self.names is None or spec.name in self.names
