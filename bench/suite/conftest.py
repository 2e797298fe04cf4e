"""Where the suite runs, and the limits of that device, measured in the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retinar.bench.timing import Limits, limits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"), help="the device to measure")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--bench-device")
    if "measurement" in metafunc.fixturenames:
        from retinar.bench.ops import measurements

        metafunc.parametrize("measurement", list(measurements(device)), ids=lambda found: found.id)
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
