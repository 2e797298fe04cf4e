"""A check passes what is right and catches each way in which an op can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retinar.bench import checks, checks_whole, variants
from retinar.bench.checks import Trial
from retinar.kernels import ops
from retinar.kernels.spec import Inputs, OpSpec

SPECS = {spec.name: spec for spec in variants.BENCHED}


def trial(spec: OpSpec, **changes: Any) -> Trial:
    return Trial(spec, spec.cases[1], torch.float32, "reference", "cpu", **changes)


@pytest.mark.parametrize("name", SPECS)
def test_the_references_pass(name: str) -> None:
    spec = SPECS[name]
    for case in spec.cases[:2]:
        for dtype in spec.dtypes:
            assert checks.check(Trial(spec, case, dtype, "reference", "cpu")) is None


def broken(spec: OpSpec, change: Callable[[Tensor, Inputs], Tensor]) -> OpSpec:
    """The spec with another first result; fp64, the truth, stays."""

    def run(inputs: Inputs, backend: str | None) -> tuple[Tensor, ...]:
        first, *rest = spec.run(inputs, backend)
        narrow = all(each.dtype != torch.float64 for each in inputs.values() if isinstance(each, Tensor))
        return (change(first, inputs) if narrow else first, *rest)

    return replace(spec, run=run)


def test_an_error_beyond_the_budget_is_caught() -> None:
    wrong = checks.check(trial(broken(SPECS["rms_norm"], lambda y, _: y * 1.001)))
    assert wrong is not None and wrong.startswith("rms_norm (") and "error of" in wrong and "allowed are" in wrong


def test_nan_is_caught() -> None:
    wrong = checks.check(trial(broken(SPECS["swiglu"], lambda y, _: y.index_fill(0, torch.tensor(0), float("nan")))))
    assert wrong is not None and "nan" in wrong


def test_wrong_codes_are_caught() -> None:
    wrong = checks.check(trial(broken(SPECS["vq_lookup"], lambda codes, _: codes.flip(0))))
    assert wrong is not None and "differs in" in wrong


def test_a_wrong_shape_is_caught() -> None:
    wrong = checks.check(trial(broken(SPECS["swiglu"], lambda y, _: y[:1])))
    assert wrong is not None and "has shape" in wrong


def test_a_wrong_gradient_is_caught() -> None:
    spec = broken(SPECS["swiglu_packed"], lambda y, i: y.detach() + 0.9 * (y - y.detach()))
    wrong = checks.check(trial(spec))
    assert wrong is not None and "the gradient of gate_up has a" in wrong


def test_forgotten_strides_are_caught() -> None:
    def strides_ignored(y: Tensor, i: Inputs) -> Tensor:
        return y if i["x"].is_contiguous() else y.flip(-1)

    wrong = checks.check(trial(broken(SPECS["rms_norm"], strides_ignored)))
    assert wrong is not None and "from strided inputs" in wrong


def test_other_bits_in_a_second_run_are_caught() -> None:
    runs = [0]

    def restless(y: Tensor, _: Inputs) -> Tensor:
        runs[0] += 1
        return y.nextafter(torch.full_like(y, 9.0)) if runs[0] == 3 else y

    wrong = checks.bits(trial(broken(SPECS["linear"], restless)))
    assert wrong is not None and "other bits in a second run" in wrong


def test_an_output_that_is_not_written_whole_is_caught() -> None:
    def unwritten(y: Tensor, _: Inputs) -> Tensor:
        out = torch.empty_like(y)
        out[..., :-1] = y[..., :-1]
        if not out[..., -1].isnan().any():  # fresh memory that happens to hold the right numbers
            out[..., -1] = y[..., -1]
        return out

    spec = broken(SPECS["cfg_mix"], unwritten)
    assert checks.forward(trial(spec)) is None
    wrong = checks.bits(trial(spec))
    assert wrong is not None and "depends on what fresh memory holds" in wrong
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_an_op_raises_is_a_sentence() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such variant\nand a long story")

    wrong = checks.check(trial(replace(SPECS["linear"], run=fails, truth=SPECS["linear"].plain)))
    assert wrong is not None and wrong.endswith("RuntimeError: no such variant")


def test_backends_that_run_here() -> None:
    for spec in variants.BENCHED:
        assert "reference" in checks.runnable(spec, "cpu", torch.float32)
    assert "sdpa" in checks.runnable(SPECS["rope_attention"], "cpu", torch.float32)
    assert "sdpa" not in checks.runnable(SPECS["rope_attention_dropout"], "cpu", torch.float32)


def test_the_dropout_mask_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_whole.dropout("reference", "cpu", torch.float32) is None
    original = ops.rope_attention

    def other_seed(*args: Any, **options: Any) -> Any:
        if args[0].dtype == torch.float32:
            options["seed"] = options["seed"] + 1
        return original(*args, **options)

    monkeypatch.setattr(ops, "rope_attention", other_seed)
    wrong = checks_whole.dropout("reference", "cpu", torch.float32)
    assert wrong is not None and "are dropped otherwise" in wrong


@pytest.mark.parametrize("name", checks_whole.ROWWISE)
def test_far_tiles_are_compared(name: str) -> None:
    far = {"elements": 4096, "width": 40}
    assert checks_whole.far(SPECS[name], "cpu", torch.bfloat16, **far) is None

    def wraps_around(y: Tensor, _: Inputs) -> Tensor:
        """What a 32-bit index does: the end lands on other rows."""
        out = y.clone()
        if y.numel() > 2000:
            out[-1] = y[0] + 1
        return out

    wrong = checks_whole.far(broken(SPECS[name], wraps_around), "cpu", torch.bfloat16, **far)
    assert wrong is not None and "from" in wrong and "on are wrong" in wrong


def test_a_training_step_is_held_to_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_whole.training_step("cpu") is None
    original = ops.linear_cross_entropy

    def off(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        loss = original(hidden, *args, **options)
        steps[0] += 1
        return loss * (1.3 if steps[0] == 3 else 1.0)  # the truth and the yardstick come first

    steps = [0]
    monkeypatch.setattr(ops, "linear_cross_entropy", off)
    wrong = checks_whole.training_step("cpu")
    assert wrong is not None and "the loss is off by" in wrong
