"""Steps that must not be applied: named, left out or ended; nothing is read from the device where nothing is asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.progress import silent
from retinar.train import gpt
from retinar.train.code_files import CodeSet
from retinar.train.gpt import GPTTask, train_gpt
from retinar.train.guard import MOST_SKIPPED, Guard, batch_names
from retinar.train.metrics_log import read_metrics
from tests.train.tiny import tiny_config, write_codes


def allow(guard: Guard, *norms: float) -> list[bool]:
    return [guard.allows(step, torch.tensor(norm), lambda step: f"images {step}") for step, norm in enumerate(norms)]


def test_nothing_is_read_without_need() -> None:
    guard = Guard("stop", None)
    assert guard.allows(0, None, str)  # type: ignore[arg-type]


def test_spikes_are_held_against_the_median() -> None:
    guard = Guard("skip", 5.0)
    usual = [1.0 + 0.01 * i for i in range(40)]
    assert all(allow(guard, *usual)), "nothing is a spike before a quarter of the memory is there, or below the limit"
    assert allow(guard, 5.9, 6.1, math.inf, math.nan, 1.0) == [True, False, False, False, True]
    assert all(allow(Guard("skip", 5.0), 1.0, 1000.0)), "too few to judge by"


def test_stopping_names_step_and_images() -> None:
    guard = Guard("stop", 2.0)
    allow(guard, *[1.0] * 30)
    with pytest.raises(InputError, match=r"norm 9 \(usual: 1\) at step 1, images 0.*guard=skip"):
        allow(guard, 9.0)


def test_skipping_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    guard = Guard("skip", None)
    assert not any(allow(guard, *[math.nan] * MOST_SKIPPED))
    assert capsys.readouterr().err.count("left out") == MOST_SKIPPED
    with pytest.raises(InputError, match="as in the 20 steps before"):
        allow(guard, math.nan)


def test_the_state_comes_back() -> None:
    first, second = Guard("skip", 3.0), Guard("skip", 3.0)
    allow(first, *[1.0] * 30, 9.0)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert allow(second, 3.5) == [False]


def test_names_of_a_batch() -> None:
    names = [f"{i}.jpg" for i in range(9)]
    assert batch_names([2, 0], names) == "images 2.jpg, 0.jpg"
    assert batch_names(range(6), names) == "images 0.jpg, 1.jpg, 2.jpg, 3.jpg and 2 more"
    assert batch_names([7], None) == "images 7"


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    names = [f"train/healthy/{i}.png" for i in range(12)]
    return write_codes(tmp_path / "codes", names=names)


def broken_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The gradient of step ``step`` (counted from 0) becomes NaN."""
    original, calls = gpt.clip_gradients, [0]

    def clip(parameters: Any, max_norm: float | None) -> Tensor:
        held = list(parameters)
        if calls[0] == step:
            for parameter in held:
                parameter.grad.fill_(math.nan)
        calls[0] += 1
        return original(held, max_norm)

    monkeypatch.setattr(gpt, "clip_gradients", clip)


def test_a_skipped_step_changes_no_weight(codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(guard="skip")
    task = GPTTask(GPT(config.model), config, CodeSet(codes), steps=10)
    broken_at(monkeypatch, 1)
    assert task.step(0)["skipped"] == 0.0
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in task.ema.averages.items()} if task.ema else {}
    values = task.step(1)
    assert values["skipped"] == 1.0 and "loss" not in values
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert task.ema is not None
    assert all(torch.equal(tensor, average[name]) for name, tensor in task.ema.averages.items())
    task.step(2)
    assert not torch.equal(task.model.state_dict()["output.weight"], before["output.weight"])


def test_a_run_goes_on_after_a_bad_step(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_at(monkeypatch, 5)
    result = train_gpt(tiny_config(guard="skip"), codes, tmp_path / "run", progress=silent)
    assert result.reason == "finished"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines if "skipped" in line] == [0.0, pytest.approx(1 / 3), 0.0, 0.0, 0.0]
    assert "left out a gradient of norm nan at step 6, images train/healthy/" in capsys.readouterr().err


def test_a_run_stops_at_a_bad_step_with_its_images(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, 5)
    with pytest.raises(InputError, match=r"grad_norm nan at step 6, images train/healthy/\d+.png.*step 4"):
        train_gpt(tiny_config(), codes, tmp_path / "run", progress=silent)
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000004"]


def test_out_of_memory_says_what_to_change(codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 << 30

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpt, "clip_gradients", full)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    wanted = r"80 GiB, found it out of memory: set activation_checkpointing=full.*accumulation=4, parallel=fsdp"
    with pytest.raises(InputError, match=wanted):
        train_gpt(tiny_config(), codes, tmp_path / "run", progress=silent)
