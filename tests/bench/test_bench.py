"""The benchmarks measure what they say, and their results can be read again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from retinar.bench import cases, gpu, machine, ops, record, report, timing
from retinar.engine.errors import InputError
from retinar.kernels.spec import ALL_SPECS

LIMIT = timing.Limits(1e9, 1e10)


def test_every_op_has_a_size_of_its_own_keys() -> None:
    for device, sizes in cases.SIZES.items():
        assert set(sizes) == {spec.name for spec in ALL_SPECS}, device
        for spec in ALL_SPECS:
            assert set(sizes[spec.name]) == set(spec.cases[0]), (device, spec.name)


def test_measure_takes_the_time_that_passes() -> None:
    found = timing.measure([lambda: time.sleep(0.01)], "cpu", seconds=0.05, least=3)
    assert found.fastest <= found.median <= found.slowest
    assert 0.01 <= found.median < 0.1
    assert found.runs >= 3


def test_measure_rotates_the_calls() -> None:
    seen: list[int] = []
    timing.measure([lambda index=index: seen.append(index) for index in range(3)], "cpu", seconds=0, least=9)  # type: ignore[misc]
    assert seen[-9:] == [0, 1, 2] * 3


def test_copies_exceed_the_cache_and_stay_bounded() -> None:
    assert timing.copies(timing.COLD_BYTES) == 1
    assert timing.copies(timing.COLD_BYTES // 8) * (timing.COLD_BYTES // 8) >= timing.COLD_BYTES
    assert timing.copies(1) == timing.MAX_COPIES


def test_share_is_the_tighter_limit() -> None:
    assert timing.share(1.0, 10**9, 0, LIMIT) == 1.0
    assert timing.share(2.0, 10**9, 10**10, LIMIT) == 0.5
    assert timing.share(1.0, 10**8, 5 * 10**9, LIMIT) == 0.5


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 2**24)
    found = timing.limits("cpu", seconds=0.0)
    assert found.bytes_per_s > 1e8 and found.flops_per_s > 1e8


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: spec.name)
def test_check_passes_the_reference_and_catches_a_wrong_op(spec, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    case = spec.cases[1]
    assert ops.check(spec, case, torch.float32, "reference", "cpu") is None
    wide = {"now": False}

    def wrong(inputs, backend):  # type: ignore[no-untyped-def]
        results = spec.run(inputs, backend)
        wide["now"] = not wide["now"]
        if wide["now"] and spec.truth is None:  # the first call is the truth
            return results
        return tuple(result + 1 for result in results)

    from dataclasses import replace

    assert ops.check(replace(spec, run=wrong), case, torch.float32, "reference", "cpu")


def test_row_of_a_result() -> None:
    spec = next(spec for spec in ALL_SPECS if spec.name == "rms_norm")
    what = ops.Measurement(spec, spec.cases[-1], torch.float32, "reference", "cpu")
    assert len(what.calls(most=2)) == 2
    row = what.row(timing.Timing(1e-3, 9e-4, 2e-3, 7), LIMIT)
    assert (row["bytes"], row["flops"]) == (spec.bytes(spec.cases[-1], 4), spec.flops(spec.cases[-1]))
    assert row["share"] == pytest.approx(timing.share(1e-3, what.bytes(), what.flops(), LIMIT))


def test_backends_that_run_here() -> None:
    for spec in ALL_SPECS:
        assert "reference" in ops.runnable(spec, "cpu", torch.float32)
        assert "triton" not in ops.runnable(spec, "cpu", torch.float32)


def result(tmp_path: Path) -> Path:
    rows = [{"name": "x", "case": "n=1", "dtype": "float32", "backend": "reference", "seconds": 1.5e-3, "share": 0.25}]
    return record.save(tmp_path, record.document("cpu", rows, {"float32": LIMIT}, {"passed": True}))


def test_result_file_says_where_it_comes_from(tmp_path: Path) -> None:
    path = result(tmp_path)
    assert path.parent == tmp_path / machine.slug(machine.cpu_name())
    content = record.load(path)
    for key in ("device", "commit", "date", "command", "torch", "cores", "limits", "tests"):
        assert key in content
    table = report.markdown(content)
    assert "1.5 ms" in table and "25 %" in table and content["date"] in table
    assert report.main([str(path)]) == 0


def test_a_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"format": 99}))
    for path in (tmp_path / "other.json", tmp_path / "absent.json"):
        with pytest.raises(InputError, match=path.name):
            record.load(path)
        assert report.main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: its absence cannot be shown")
def test_gpu_without_a_gpu_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "CUDA" in told.err and told.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_whole_benchmark_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "0"]) == 0
    (path,) = tmp_path.rglob("*.json")
    content = record.load(path)
    assert content["tests"]["passed"] and content["tests"]["checked"] > 50
    assert {row["name"] for row in content["rows"]} >= {spec.name for spec in ALL_SPECS} | {"sample", "decode"}
    assert all(row["seconds"] > 0 for row in content["rows"])
