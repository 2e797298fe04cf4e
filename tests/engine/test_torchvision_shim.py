"""torchvision imports beside any torch, in a fresh process as users have it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the package torchvision is not installed")
def test_torchvision_and_what_needs_it_import() -> None:
    script = """
import torch
from retinar.engine.torchvision_shim import import_torchvision
first = import_torchvision()
assert import_torchvision() is first
from torchvision import models
assert models.vgg16
assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_importing_the_shim_imports_nothing() -> None:
    script = "import sys, retinar.engine.torchvision_shim; assert 'torchvision' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
