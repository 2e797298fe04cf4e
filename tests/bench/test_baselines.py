"""Baselines compute what the ops compute, and one that cannot run is named with its reason."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from retinar.bench import ops
from retinar.bench.baselines import attention, liger, plain
from retinar.bench.baselines import kernels as baselines
from retinar.bench.baselines.kernels import Absent
from retinar.bench.cases import DTYPES, FIRST, LEFT_OUT, SIZES, directions
from retinar.bench.ops import Measurement
from retinar.bench.plan import plan
from retinar.bench.timing import Limits, Timing
from retinar.bench.variants import ATTENTION_DROPOUT, BENCHED

SPECS = {spec.name: spec for spec in BENCHED}
LIMIT = Limits(1e9, 1e10)


def test_every_op_has_a_size_of_its_own_keys() -> None:
    for size, cases in SIZES.items():
        assert set(cases) == set(SPECS), size
        for name, spec in SPECS.items():
            keys = set(spec.cases[0])
            assert set(cases[name]) == keys, (size, name)


def test_names_in_the_tables_are_specs() -> None:
    known = set(SPECS)
    assert set(FIRST) <= known and set(plain.COMPILED) <= known and set(attention.NAMES) <= known
    assert {name for _, name, _ in LEFT_OUT} <= known
    for each in baselines.BASELINES:
        assert each.names is None or set(each.names) <= known
    assert set(DTYPES) == set(SIZES)


def test_every_attention_has_its_baselines() -> None:
    assert {name for name in SPECS if name.startswith("rope_attention")} == set(attention.NAMES)


def test_absent_baselines_are_named_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    missing = {"flash_attn", "liger_kernel"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else original(name, *a))
    found = {each[:2]: each.reason for each in plan("cpu", "cpu") if isinstance(each, Absent)}
    assert found["FlashAttention alone", "rope_attention"] == "flash-attn is not installed"
    assert found["Liger", "add_rms_norm"] == "liger-kernel is not installed"
    assert "on a CPU" in found["torch.compile", "rms_norm"]


def test_an_installed_package_that_cannot_be_imported_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger.BASELINES[0].absent, "__code__", (lambda device, size: None).__code__)
    found = [each for each in baselines.measurements(SPECS["swiglu"], "cpu", "exercise") if isinstance(each, Absent)]
    assert [each.baseline for each in found] == ["Liger"] and "ModuleNotFoundError" in found[0].reason


@pytest.mark.parametrize("name", [name for name in SPECS if name != ATTENTION_DROPOUT.name])
def test_baselines_agree_with_the_op(name: str) -> None:
    spec = SPECS[name]
    measured = [each for each in baselines.measurements(spec, "cpu", "exercise") if isinstance(each, Measurement)]
    inputs = measured[0].inputs(most=1)[0]
    assert {"torch eager"} <= {each.name for each in measured}
    for what in measured:
        if what.direction == "forward" and what.name != "torch.compile":
            assert baselines.disagrees(what, inputs) is None, what.id


def test_what_is_timed_is_the_op() -> None:
    """The calls that are made otherwise than the spec's give the spec's results."""
    seen = set()
    for what in plan("cpu", "exercise"):
        if isinstance(what, Measurement) and not what.baseline and what.direction == "forward":
            (inputs,) = what.inputs(most=1)
            dropped = what.spec.name == ATTENTION_DROPOUT.name  # by another seed
            for one, other in zip(what.run(inputs), what.spec.run(inputs, what.name), strict=False):
                assert one.shape == other.shape if dropped else torch.equal(one, other), what.id
            seen.add(what.spec.name)
    assert seen == set(SPECS)


def test_a_baseline_that_computes_something_else_has_no_time() -> None:
    what = next(iter(baselines.measurements(SPECS["swiglu"], "cpu", "exercise")))
    assert isinstance(what, Measurement)
    wrong = replace(what, run=lambda i: (i["gate"] * i["up"],))
    assert "differs from plain torch's by" in (baselines.disagrees(wrong, what.inputs(most=1)[0]) or "")


def test_backward_times_the_backward_alone() -> None:
    spec = SPECS["swiglu_packed"]
    calls: list[str] = []

    class Logged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            calls.append("forward")
            return x[..., ::2].clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            calls.append("backward")
            return grad.repeat_interleave(2, -1)

    for direction in directions(spec):
        what = Measurement(
            spec, spec.cases[1], torch.float32, "x", lambda i: (Logged.apply(i["gate_up"]),), "cpu", direction
        )
        (call,) = what.calls(what.inputs(most=1))
        calls.clear()
        call()
        call()
        assert calls == [direction] * 2


@pytest.mark.parametrize("name", ["rms_norm", "rope_attention", "vq_lookup"])
def test_rows_say_what_the_limits_allow(name: str) -> None:
    spec = SPECS[name]
    case = spec.cases[2]
    run = ops.backend_run(spec, "reference")
    for direction in directions(spec):
        what = Measurement(spec, case, torch.float32, "reference", run, "cpu", direction)
        row = what.row(Timing(1e-3, 9e-4, 2e-3, 7, False), LIMIT)
        forward = (spec.bytes(case, 4), spec.flops(case))
        if spec.backward_bytes is None or spec.backward_flops is None:
            backward = None
        else:
            backward = (spec.backward_bytes(case, 4), spec.backward_flops(case))
        parts = {"forward": [forward], "backward": [backward], "both": [forward, backward]}[direction]
        if None in parts:
            assert row["share"] is row["bytes"] is None
            continue
        assert row["bytes"] == sum(part[0] for part in parts if part) and row["queued"] is False
        least = sum(max(part[0] / LIMIT.bytes_per_s, part[1] / LIMIT.flops_per_s) for part in parts if part)
        assert row["share"] == pytest.approx(least / 1e-3)


def test_backwards_are_counted_where_there_are_targets() -> None:
    for name in FIRST:
        spec, case = SPECS[name], SIZES["cuda"][name]
        assert spec.backward_bytes is not None and spec.backward_flops is not None, name
        assert 0 < spec.bytes(case, 2) <= spec.backward_bytes(case, 2) <= 2.5 * spec.bytes(case, 2), name
        assert spec.flops(case) < spec.backward_flops(case) <= 3 * spec.flops(case), name
