"""Targets on made-up rows: met, missed, not measured."""

from __future__ import annotations

from typing import Any

import pytest

from retinar.bench import report, targets
from retinar.bench.targets import OURS, ROTATED, TARGETS, UNFUSED


def row(op: str, direction: str, backend: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "name": op, "direction": direction, "backend": backend, "baseline": backend not in (OURS, "reference"),
        "case": "n=1", "dtype": "bfloat16", "seconds": seconds, "bytes": 1000, "flops": 1, "share": 0.5,
        "queued": True, "peak_bytes": None, **more,
    }  # fmt: skip


def content(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A result whose copy moves 1000 bytes in a second."""
    limits = {"bfloat16": {"bytes_per_s": 1000.0, "flops_per_s": 1e12}}
    head = {"device": "Made-up GPU", "kind": "cuda", "cores": 1, "threads": 1, "torch": "2", "date": "2026-01-01"}
    tests = {"failed": [], "checked": 1}
    return {**head, "commit": "c0ffee", "command": "x", "limits": limits, "tests": tests, "rows": list(rows), **more}


def state(found: dict[str, Any], op: str, what: str = "") -> dict[str, Any]:
    (one,) = [each for each in targets.evaluate(found) if each["op"] == op and what in each["what"]]
    return one


def test_every_target_is_here() -> None:
    kernels = [each for each in TARGETS if each.op != "sampling"]
    wanted = {(each.op, each.what.split(",")[0], each.threshold) for each in kernels if each.unit == "%"}
    for op in ("rms_norm", "add_rms_norm", "swiglu"):
        assert {(op, "forward", 0.85), (op, "backward", 0.75)} <= wanted
    others = {(each.op, each.threshold, each.least) for each in kernels if each.unit != "%"}
    assert others == {
        ("rope_attention", 1.0, True),
        ("rope_attention_dropout", 1.0, True),
        ("linear_cross_entropy", 0.25, False),
        ("linear_cross_entropy", 1.1, False),
    }
    sampled = [(each.threshold, each.least, each.unit) for each in TARGETS if each.op == "sampling"]
    assert sampled == [(1.5, False, "s"), (10.0, True, "x"), (0.6, True, "%"), (5.0, True, "x")]


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, "met"), (1 / 0.85, "met"), (1.25, "missed by 5 %")])
def test_bandwidth(seconds: float, expected: str) -> None:
    found = state(content(row("rms_norm", "forward", OURS, seconds)), "rms_norm", "forward")
    assert found["state"] == expected and found["value"] == pytest.approx(1 / seconds)


def test_the_bandwidth_is_that_of_a_copy_whatever_the_tighter_limit() -> None:
    heavy = row("swiglu", "backward", OURS, 1.0, flops=10**15)
    assert state(content(heavy), "swiglu", "backward")["value"] == pytest.approx(1.0)


def test_attention_is_compared_both_ways_and_with_dropout_apart() -> None:
    rows = [row("rope_attention", "both", OURS, 1.0), row("rope_attention", "both", ROTATED, 1.2)]
    rows += [row("rope_attention_dropout", "both", OURS, 1.5), row("rope_attention_dropout", "both", ROTATED, 1.2)]
    rows += [row("rope_attention", "forward", OURS, 9.0)]
    found = content(*rows)
    assert state(found, "rope_attention")["state"] == "met"
    assert state(found, "rope_attention")["value"] == pytest.approx(1.2)
    assert state(found, "rope_attention_dropout")["state"] == "missed by 0.20x"


def test_the_losss_memory_and_time() -> None:
    rows = [row("linear_cross_entropy", "both", OURS, 1.0, peak_bytes=30)]
    rows += [row("linear_cross_entropy", "both", UNFUSED, 1.0, peak_bytes=100)]
    found = content(*rows)
    assert state(found, "linear_cross_entropy", "memory")["state"] == "missed by 0.05x"
    assert state(found, "linear_cross_entropy", "time")["state"] == "met"


def test_what_a_row_is_missing_for_is_not_measured() -> None:
    found = content(row("rope_attention", "both", OURS, 1.0), row("linear_cross_entropy", "both", OURS, 1.0))
    assert {each["state"] for each in targets.evaluate(found)} == {"not measured"}
    assert all(each["value"] is None for each in targets.evaluate(content()))


def test_an_exercise_and_a_cpu_measure_no_target() -> None:
    rows = [row("rms_norm", "forward", OURS, 1.0)]
    for other in (content(*rows, exercise=True), content(*rows, kind="cpu")):
        assert {each["state"] for each in targets.evaluate(other)} == {"not measured"}


def test_a_missed_target_has_its_evidence_beside_it() -> None:
    kernel = {"name": "swiglu_forward", "op": "swiglu", "group": "gate", "calls": 36.0, "seconds": 0.004}
    step = {
        "recipe": "r", "model": "m", "batch": 8, "precision": "bf16", "compiled": True, "seconds": 0.5,
        "tokens_per_s": 1.0, "groups": [{"group": "gate", "seconds": 0.004, "share": 0.01}], "kernels": [kernel],
        "missing": [],
    }  # fmt: skip
    rows = [row("swiglu", "forward", OURS, 2.0), row("swiglu", "forward", UNFUSED, 4.0, queued=False)]
    found = content(*rows, profile=step)
    found["targets"] = targets.evaluate(found)
    told = report.markdown(found)
    assert "missed by 35 %" in told
    after = told[told.index("In the way of swiglu:") :]
    assert "forward, triton: 2000000.0 us, 50 % of the limit" in after
    assert "torch eager: 4000000.0 us, 50 % of the limit, the host in it" in after
    assert "in the training step: swiglu_forward, 36.0 calls, 4.00 ms" in after
    assert "In the way of rms_norm" not in told
