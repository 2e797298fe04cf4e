"""Shared fixtures: golden vectors, real photographs where there are some, one thread a test process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-native", action="store_true", help="fail when the compiled CPU module is not loaded (make test, CI)"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if config.getoption("--require-native"):
        from retinar.kernels import ops

        native = ops.native_info()
        if not native["loaded"]:
            raise pytest.UsageError(f"--require-native: the compiled module is not loaded ({native['reason']})")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of vectors that the public implementations produced (tests/data/golden/README.md)."""
    return ROOT / "tests" / "data" / "golden"


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real photographs in OIA-DDR's layout, beside the checkout where there are any: never to be redistributed."""
    folder = ROOT.parent / "shared" / "data" / "DR_grading"
    if not folder.is_dir():
        pytest.skip("the photographs ../shared/data/DR_grading are missing (they may not be redistributed)")
    return folder


@pytest.fixture(scope="session")
def vgg_weights() -> Path:
    """VGG16's convolutional weights for LPIPS, beside the checkout where there are any."""
    path = ROOT.parent / "shared" / "weights" / "vgg16_features_fp16.safetensors"
    if not path.is_file():
        pytest.skip("the weights ../shared/weights/vgg16_features_fp16.safetensors are missing")
    return path
