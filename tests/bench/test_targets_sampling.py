"""The targets of sampling on made-up results: met, missed, not measured; and the tables that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retinar.bench import readme, record, report, report_sampling, targets
from retinar.bench.sampling_sizes import INVARIANT, OURS, SIZES, STATIC, TO_PNG, UPSTREAM
from retinar.engine.files import write_json

EAGER, COMPILED = UPSTREAM["eager"], UPSTREAM["compile"]


def row(backend: str, images: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "name": "sampling", "direction": "forward", "model": "GPT-XL", "backend": backend, "images": images,
        "codes": 1024, "dtype": "bfloat16", "seconds": seconds, "images_per_s": images / seconds, "extrapolated": False,
        "steps": 1024, "step_p50": seconds / 1024, "step_p99": seconds / 512, "share": 0.5, "baseline": backend != OURS,
        "peak_bytes": 3 * 2**30, "graph_bytes": None, "warm_up_seconds": 2.0, **more,
    }  # fmt: skip


def content(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    step = {
        "images": 64, "position": 511, "trace": "x-step.json.gz", "missing": ["cfg_sample"], "kernels": [],
        "groups": [{"group": "attention", "seconds": 0.004, "share": 0.75}],
    }  # fmt: skip
    sampling = {
        "model": "GPT-XL", "size": "36 layers", "codes": 1024, "cfg_scale": 2.0, "rows": list(rows), "step": step,
        "absent": [{"backend": STATIC, "images": n, "reason": "no luck"} for n in (1, 64)],
    }  # fmt: skip
    head = {"format": record.FORMAT, "device": "GPU", "kind": "cuda", "cores": 1, "threads": 1, "torch": "2"}
    head |= {"date": "2026-01-01", "commit": "c0ffee", "command": "x", "limits": {}, "rows": []}
    return {**head, "tests": {"failed": [], "checked": 1}, "sampling": sampling, **more}


def states(found: dict[str, Any]) -> list[str]:
    return [each["state"] for each in targets.evaluate(found) if each["op"] == "sampling"]


def theirs(seconds: float) -> list[dict[str, Any]]:
    """LlamaGen at every number of images, ``seconds`` an image whatever their number but for 64 compiled."""
    rows = [row(name, images, images * seconds) for name in (EAGER, COMPILED) for images in SIZES["cuda"].upstream]
    return [{**each, "images_per_s": 2 / seconds} if (each["backend"], each["images"]) == (COMPILED, 64) else each
            for each in rows]  # fmt: skip


def test_all_met() -> None:
    found = content(row(OURS, 1, 1.5), row(OURS, 64, 5.0, share=0.6), row(OURS, 256, 15.0), *theirs(20.0))
    assert states(found) == ["met"] * 4
    values = [each["value"] for each in targets.evaluate(found) if each["op"] == "sampling"]
    assert values == pytest.approx([1.5, 20 / 1.5, 0.6, 256 / 15 / 0.1])


def test_missed_by_so_much_and_with_the_evidence() -> None:
    found = content(row(OURS, 1, 2.25), row(OURS, 64, 64.0, share=0.55), *theirs(9.0))
    assert states(found) == ["missed by 0.75 s", "missed by 6.00x", "missed by 5 %", "missed by 0.50x"]
    found["targets"] = targets.evaluate(found)
    told = report.markdown(found)
    evidence = told[told.index("In the way of sampling:") :]
    assert "64 images: 64 s" in evidence and "55 % of the bound" in evidence
    assert "a step of 64 images at position 511: attention 75 %" in evidence


def test_what_was_not_measured_has_no_state() -> None:
    assert states(content()) == ["not measured"] * 4
    assert states({key: value for key, value in content().items() if key != "sampling"}) == ["not measured"] * 4
    assert states(content(row(OURS, 1, 1.0)))[:2] == ["met", "not measured"]
    assert states(content(row(OURS, 1, 1.0), exercise=True)) == ["not measured"] * 4
    assert states(content(row(OURS, 1, 1.0), kind="cpu")) == ["not measured"] * 4


def test_a_window_is_no_image_and_another_model_no_paper() -> None:
    assert states(content(row(OURS, 1, 1.0, extrapolated=True)))[0] == "not measured"
    for other in ({"model": "GPT-B"}, {"codes": 256}, {"dtype": "float32"}):
        assert states(content(row(OURS, 1, 1.0, **other), row(OURS, 64, 1.0, **other))) == ["not measured"] * 4


def test_their_best_is_known_when_all_of_theirs_is() -> None:
    """LlamaGen may be extrapolated; but what is missing might be its best."""
    for gone in range(8):
        found = content(row(OURS, 64, 1.0), *(each for n, each in enumerate(theirs(20.0)) if n != gone))
        assert states(found)[3] == "not measured"


def test_the_report_shows_rows_costs_and_absences() -> None:
    png = {"backend": TO_PNG, "images": 128, "slots": 64, "images_per_s": 9.0, "alone_images_per_s": 10.0}
    png |= {
        "seconds": 14.2,
        "kept_up": 0.9,
        "model": "GPT-XL",
        "tokenizer": "VQ-8",
        "name": "sampling",
        "baseline": False,
    }
    rows = [row(OURS, 64, 4.0), row(INVARIANT, 64, 5.0), row(EAGER, 64, 40.0, extrapolated=True)]
    told = report.markdown(content(*rows, {**png, "codes": 1024, "dtype": "bfloat16"}))
    assert "batch invariant, 64 at once: 1.25x the time" in told and "40 s (from a window)" in told
    assert "9 img/s, the codes alone 10 (90 %)" in told and "3.0 GiB" in told
    assert f"absent: {STATIC} (1, 64 images): no luck" in told
    assert "its trace: x-step.json.gz" in told and "missing: cfg_sample" in told
    assert report_sampling.memory(2**29) == "512 MiB" and report_sampling.memory(None) == "-"


def save(folder: Path, date: str, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{date}.json", content(row(OURS, 1, float(date[-2:])), date=date, **more))


def test_the_readmes_table(tmp_path: Path) -> None:
    empty = readme.section([])
    assert [line.split("|")[1].strip() for line in empty.splitlines() if "| not measured  | -" in line] == [
        "1", "8", "64", "256"
    ]  # fmt: skip
    found = content(row(OURS, 64, 4.0), row(INVARIANT, 64, 5.0), row(COMPILED, 64, 40.0, extrapolated=True, steps=32))
    told = readme.section([found])
    assert "| 64             | 3.91 ms, 7.81 ms | 4 s | 16    | 50 %               | 1.25x the time" in told
    assert f"- {COMPILED}, 64 at once: 1.6 img/s, step 39.1 ms, from 32 steps" in told
    assert "| 1              | not measured" in told


def test_a_result_of_sampling_alone_does_not_hide_the_kernels(tmp_path: Path) -> None:
    save(tmp_path / "gpu", "2026-01-01")
    save(tmp_path / "gpu", "2026-02-02", only="sampling")
    save(tmp_path / "gpu", "2026-03-03", exercise=True)
    (found,) = readme.newest(tmp_path)
    assert found["date"] == "2026-01-01" and found["sampling"]["rows"][0]["seconds"] == 2.0
    told = readme.section([found])
    assert "2026-02-02" in told and "| 2 s" in told
    save(tmp_path / "gpu", "2026-04-04")
    assert readme.newest(tmp_path)[0]["sampling"]["rows"][0]["seconds"] == 4.0
