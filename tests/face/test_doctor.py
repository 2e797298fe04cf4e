"""`retinar doctor` says what is there and what is not."""

from __future__ import annotations

import json

import torch

from retinar.bench import machine
from retinar.kernels import ops
from tests.face.world import Shell


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


def test_a_missing_native_module_is_explained(shell: Shell, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    info = {"loaded": False, "isa": None, "reason": "no compiler was found"}
    monkeypatch.setattr(ops, "native_info", lambda: info)
    assert "not loaded: no compiler was found" in shell("doctor").out
