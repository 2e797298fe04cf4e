"""Result files say where their figures come from, and `retinar bench` files what the suite measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinar.bench import machine, record, report, timing
from retinar.bench.run import run_suite
from retinar.engine.errors import InputError

LIMIT = timing.Limits(1e9, 1e10)


def test_result_file_says_where_it_comes_from(tmp_path: Path) -> None:
    row = {"name": "x", "case": "n=1", "dtype": "float32", "direction": "backward", "backend": "reference"}
    rows = [row | {"seconds": 1.5e-3, "share": 0.25}]
    path = record.save(tmp_path, record.document("cpu", rows, {"float32": LIMIT}, {"passed": True}))
    assert path.parent == tmp_path / machine.slug(machine.cpu_name())
    content = record.load(path)
    for key in ("device", "commit", "date", "command", "torch", "triton", "cores", "limits", "tests"):
        assert key in content
    told = report.markdown(content)
    assert "1.5 ms" in told and "25 %" in told and "backward" in told and content["date"] in told
    assert report.main([str(path)]) == 0


def test_the_suite_is_filed_forward_and_backward(tmp_path: Path) -> None:
    path, content = run_suite("cpu", tmp_path, "rms_norm and not add and (native or eager or reference)")
    assert record.load(path)["rows"] == content["rows"]
    timed = {(row["name"], row["direction"], row["backend"]) for row in content["rows"]}
    for direction in ("forward", "backward"):
        assert {("rms_norm", direction, "reference"), ("rms_norm", direction, "torch eager")} <= timed
    assert {(each["name"], each["baseline"]) for each in content["absent"]} >= {("rms_norm", "torch.compile")}
    assert all(row["share"] > 0 for row in content["rows"])
    assert {each["state"] for each in content["targets"]} == {"not measured"}


@pytest.mark.slow
def test_a_keyword_that_names_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no benchmark of that name"):
        run_suite("cpu", tmp_path, "no_such_benchmark")
    assert not list(tmp_path.rglob("*.json"))
