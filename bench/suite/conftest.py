"""Where the suite runs, the limits of that device, measured in the same run, and the inputs of the op at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.bench.baselines.kernels import Absent
from retinar.bench.ops import Measurement
from retinar.bench.plan import forget_compiled, plan
from retinar.bench.timing import Limits, limits

ABSENT = pytest.StashKey[list[Absent]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"), help="the device to measure")
    parser.addoption("--bench-absent", default=None, help="where to write which baselines did not run, and why")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ABSENT] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--bench-absent")
    if path is not None:
        absent = session.config.stash[ABSENT]
        Path(path).write_text(json.dumps([each._asdict() for each in dict.fromkeys(absent)]), encoding="utf-8")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--bench-device")
    if "measurement" in metafunc.fixturenames:
        found = list(plan(device))
        metafunc.config.stash[ABSENT] += [each for each in found if isinstance(each, Absent)]
        chosen = [each for each in found if isinstance(each, Measurement)]
        metafunc.parametrize("measurement", chosen, ids=lambda each: each.id)
    if "engine_call" in metafunc.fixturenames:
        from retinar.bench.engine import engine_calls

        metafunc.parametrize("engine_call", engine_calls(device), ids=lambda found: found.name)


class _Limits(dict[torch.dtype, Limits]):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __missing__(self, dtype: torch.dtype) -> Limits:
        self[dtype] = limits(self.device, dtype)
        return self[dtype]


@pytest.fixture(scope="session")
def device_limits(request: pytest.FixtureRequest) -> Any:
    """dtype -> Limits, measured when first asked for."""
    return _Limits(request.config.getoption("--bench-device"))


@pytest.fixture(scope="session")
def inputs() -> Callable[[Measurement], Any]:
    """Measurement -> its inputs; the last op's are kept, since its measurements come one after another."""
    kept: dict[str, Any] = {}

    def get(what: Measurement) -> Any:
        if what.spec.name not in kept:
            kept.clear()
            forget_compiled()
            kept[what.spec.name] = what.inputs()
        return kept[what.spec.name]

    return get


@pytest.fixture
def absent(request: pytest.FixtureRequest) -> Callable[[Measurement, str], None]:
    """(measurement, reason): name a baseline that does not run, and skip it."""

    def skip(what: Measurement, reason: str) -> None:
        request.config.stash[ABSENT].append(Absent(what.name, what.spec.name, reason))
        pytest.skip(reason)

    return skip
