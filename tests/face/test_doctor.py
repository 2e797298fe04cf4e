"""`retinar doctor` says what is there and what is not."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from retinar.bench import machine
from retinar.kernels import ops
from tests.face.world import Shell

WITH_KERNELS = [op for op in machine.op_names() if "triton" in ops.backends(op)]


def test_doctor_as_json(shell: Shell) -> None:
    said = shell("doctor", "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert found["torch"] == torch.__version__
    assert found["cores"] >= 1
    assert found["native"] == dict(ops.native_info())
    assert set(found["ops"]) == set(machine.op_names()) and "rope_attention" in found["ops"]
    for name, backends in found["ops"].items():
        assert backends == ops.backends(name)
        assert backends["reference"] is None
    assert set(found["packages"]) == set(machine.OPTIONAL)


def test_doctor_for_people(shell: Shell) -> None:
    said = shell("doctor")
    assert said.code == 0
    for word in (torch.__version__, "native module", "reference", "paged_attention", "clean-fid"):
        assert word in said.out
    for name in machine.OPTIONAL:
        missing = machine.version(name) is None
        line = next(line for line in said.out.splitlines() if line.startswith(name))
        assert ("missing" in line) == missing and ("pip install" in line or "comes with" in line) == missing


def test_a_missing_native_module_is_explained(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"loaded": False, "isa": None, "reason": "no compiler was found"}
    monkeypatch.setattr(ops, "native_info", lambda: info)
    assert "not loaded: no compiler was found" in shell("doctor").out


def _column(out: str, op: str, name: str) -> str:
    """The cell of an op under a backend in the table for people."""
    lines = out.splitlines()
    head = next(line for line in lines if line.startswith("op "))
    row = next(line for line in lines if line.split()[:1] == [op])
    return row[head.index(name) :].split(" ")[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels run here")
def test_the_kernels_of_a_gpu_are_named_where_there_is_none(shell: Shell) -> None:
    out = shell("doctor").out
    assert "  no triton: no CUDA device was found" in out.splitlines()
    for op in WITH_KERNELS:
        assert _column(out, op, "triton") == "no"


@pytest.mark.parametrize("gpu", [False, True])
def test_missing_triton_is_explained(shell: Shell, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, package: str | None = None) -> object:
        return None if name == "triton" else found(name, package)

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(machine, "version", lambda name: None)
    out = shell("doctor").out
    reason = "triton is not installed (retinar[triton])" if gpu else "no CUDA device was found"
    assert f"  no triton: {reason}" in out.splitlines()
    assert all(_column(out, op, "triton") == "no" for op in WITH_KERNELS)
    package = next(line for line in out.splitlines() if line.startswith("triton "))
    assert "missing" in package and "pip install 'retinar[triton]'" in package


@pytest.mark.interpreted
def test_the_interpreter_runs_the_kernels(shell: Shell) -> None:
    out = shell("doctor").out
    assert all(_column(out, op, "triton") == "yes" for op in WITH_KERNELS)
    assert "no triton:" not in out
