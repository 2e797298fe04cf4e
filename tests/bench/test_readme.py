"""The README's tables are what the generator makes of the results that are committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retinar.bench import readme, record, report, report_page, report_training, targets
from retinar.bench.targets import OURS, ROTATED, TARGETS, UNFUSED
from retinar.engine.errors import InputError
from retinar.engine.files import write_json

ROOT = Path(__file__).resolve().parents[2]
STALE = "README.md is stale: run `python -m retinar.bench.report --readme`"


def result(folder: Path, device: str, date: str, seconds: float, **more: Any) -> None:
    head = {"format": record.FORMAT, "device": device, "kind": "cuda", "cores": 8, "threads": 8, "torch": "2.11"}
    head |= {"date": date, "commit": "abc", "command": "make gpu", "tests": {"checked": 1, "failed": []}}
    common = {"case": "rows=2", "dtype": "bfloat16", "bytes": 850, "flops": 1, "share": 0.9, "queued": True}
    rows = [
        {**common, "name": "rms_norm", "direction": "forward", "backend": name, "baseline": base, "seconds": time}
        for name, base, time in ((OURS, False, seconds), (UNFUSED, True, 3.0), ("Liger", True, 2.5), ("x", True, 2.6))
    ]
    limits = {"bfloat16": {"bytes_per_s": 1000.0, "flops_per_s": 1e12}}
    path = folder / device.lower() / f"{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**head, "rows": rows, "limits": limits, **more})


def test_the_readme_is_what_the_results_say() -> None:
    path = ROOT / "README.md"
    text, results = path.read_text(encoding="utf-8"), ROOT / "bench" / "results"
    assert readme.split(text, path)[1] == readme.section(readme.newest(results)), STALE
    stands = readme.split(text, path, readme.DECODING_BEGIN, readme.DECODING_END)[1]
    assert stands == readme.decoding(readme.newest_decoding(results)), STALE
    page = ROOT / report_page.PAGE
    stands = readme.split(page.read_text(encoding="utf-8"), page, readme.DECODING_BEGIN, readme.DECODING_END)[1]
    assert stands == report_page.section(readme.newest_decoding(results)), STALE.replace("README.md", report_page.PAGE)


def test_the_command_writes_all_pages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(readme, "update", lambda: "README.md")
    monkeypatch.setattr(report_page, "update", lambda: "page.md")
    monkeypatch.setattr(report_training, "update", lambda: "training.md")
    assert report.main(["--readme"]) == 0
    assert capsys.readouterr().out == "written to README.md, page.md and training.md\n"


def test_the_training_page_is_what_the_results_give() -> None:
    page = ROOT / report_training.PAGE
    _, stands, _ = readme.split(page.read_text(encoding="utf-8"), page, report_training.BEGIN, report_training.END)
    assert stands == report_training.section(report_training.newest(ROOT / "bench" / "results"))


def test_the_page_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{readme.DECODING_BEGIN}old{readme.DECODING_END}\nafter\n")
    assert report_page.update(page, tmp_path) == page
    assert page.read_text() == f"before\n{readme.DECODING_BEGIN}\n\nNot measured.\n\n{readme.DECODING_END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(InputError, match="put them back"):
        report_page.update(page, tmp_path)


def test_without_a_gpus_result_every_target_is_not_measured() -> None:
    told = readme.section([])
    assert told.split("Sampling with")[0].count("not measured") == len(TARGETS)
    for target in TARGETS:
        assert f"`{target.op}`" in told and target.what in told and target.wanted() in told
    assert ROTATED in told


def test_the_newest_result_of_each_device_counts(tmp_path: Path) -> None:
    result(tmp_path, "A100", "2026-01-01", 2.0)
    result(tmp_path, "A100", "2026-02-01", 1.0)
    result(tmp_path, "H200", "2026-01-15", 1.25)
    result(tmp_path, "H200", "2026-03-01", 9.0, exercise=True)
    found = readme.newest(tmp_path)
    assert [(each["device"], each["date"]) for each in found] == [("A100", "2026-02-01"), ("H200", "2026-01-15")]
    told = readme.section(found)
    assert "| A100 " in told and "| H200 " in told
    assert "85 %, met" in told and "68 %, missed by 17 %" in told
    assert "1 s (triton)" in told and "2.5 s (Liger)" in told and "2.6 s" not in told
    assert "In the way of `rms_norm`:" in told.split("H200, 8 cores")[1]
    assert "2026-02-01, commit abc, `make gpu`" in told


def test_the_section_is_written_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}old{readme.END}\n{readme.DECODING_BEGIN}{readme.DECODING_END}\nafter\n")
    result(tmp_path / "results", "A100", "2026-02-01", 1.0)
    readme.update(page, tmp_path / "results")
    text = page.read_text()
    assert (
        text.startswith(f"before\n{readme.BEGIN}\n\n|") and f"|\n\n{readme.END}\n{readme.DECODING_BEGIN}\n\n|" in text
    )
    assert text.endswith(f"|\n\n{readme.DECODING_END}\nafter\n")
    assert "old" not in text.replace("Threshold", "")
    readme.update(page, tmp_path / "results")
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(InputError, match="put them back"):
        readme.update(page, tmp_path / "results")


def test_a_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"format": 99}))
    for path in (tmp_path / "other.json", tmp_path / "absent.json"):
        with pytest.raises(InputError, match=path.name):
            record.load(path)
        assert report.main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert report.main([]) == 2


def test_figures_as_people_read_them() -> None:
    assert [report.seconds(value) for value in (3.2, 0.041, 7.5e-6, 4e-8)] == ["3.2 s", "41 ms", "7.5 us", "40 ns"]
    assert report.percent(None) == "-" and report.percent(0.254) == "25 %"
    assert targets.shown({"op": TARGETS[0].op, "what": TARGETS[0].what, "value": 0.871}) == "87 %"
