"""The loop with a toy task that uses every random generator: resume, stopping, reporting, refusing NaN."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.train import loop
from retinar.train.metrics_log import loss_curve, read_metrics
from retinar.train.rng import seed_everything
from retinar.train.state import RunFolder
from retinar.train.world import World


class Toy:
    """A weight that every step moves by numbers from the three global generators."""

    name = "toy"
    criterion = "valid_loss"
    world = World(torch.device("cpu"))
    done = 0

    def __init__(self) -> None:
        seed_everything(3)
        self.weight = torch.zeros(4)
        self.seen: list[int] = []
        self.nan_at: int | None = None
        self.hook: Any = None

    def step(self, step: int) -> loop.Values:
        if self.hook is not None:
            self.hook(step)
        self.seen.append(step)
        self.weight += torch.rand(4) + random.random() + float(np.random.rand())
        loss = self.weight.mean() if step != self.nan_at else torch.tensor(float("nan"))
        return {"loss": loss, "lr": 0.1}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])

    def describe(self, step: int) -> str:
        return f"images of step {step}"

    def meters(self) -> None:
        return None

    def notes(self) -> dict[str, Any]:
        return {"seen": len(self.seen)}

    def take_notes(self, notes: dict[str, Any]) -> None:
        self.taken = notes

    def evaluate(self, step: int) -> dict[str, float]:
        return {"valid_loss": float(torch.rand(())) + random.random()}  # draws: must not disturb training

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weight.json").write_text(json.dumps(self.weight.tolist()))


def train(path: Path, task: Toy, *, resume: bool = False, **changes: Any) -> loop.RunResult:
    arguments: dict[str, Any] = {"steps": 12, "checkpoint_every": 5, "log_every": 3, "eval_every": 4, "keep_last": 2}
    with RunFolder.open(path, task="toy", config={}, resume=resume) as run:
        return loop.run(task, run, **{**arguments, "progress": silent, **changes})


def reported(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path / "metrics.jsonl")]


def test_a_whole_run(tmp_path: Path) -> None:
    task = Toy()
    result = train(tmp_path / "run", task)
    assert (result.step, result.steps, result.reason) == (12, 12, "finished")
    assert task.seen == list(range(12))
    assert [line["step"] for line in reported(tmp_path / "run")] == [3, 4, 6, 8, 9, 12]
    assert sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-0000010",
        "step-0000012",
    ]
    assert json.loads((tmp_path / "run" / "model" / "weight.json").read_text()) == task.weight.tolist()
    steps, losses = loss_curve(tmp_path / "run" / "metrics.jsonl")
    assert steps == [3, 6, 9, 12] and losses == sorted(losses)
    assert result.values["loss"] == losses[-1] and "valid_loss" in result.values


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 11])
def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path, stop: int) -> None:
    whole = Toy()
    train(tmp_path / "whole", whole)

    first = Toy()
    first.hook = lambda step: step == stop - 1 and signal.raise_signal(signal.SIGINT)
    result = train(tmp_path / "run", first)
    assert (result.reason, result.step, result.model) == ("interrupted", stop, None)
    second = Toy()
    random.random(), torch.rand(3), np.random.rand()  # the states come from the checkpoint
    assert train(tmp_path / "run", second, resume=True).reason == "finished"
    assert second.seen == list(range(stop, 12))
    assert torch.equal(second.weight, whole.weight)
    assert reported(tmp_path / "run") == reported(tmp_path / "whole")


def test_steps_after_the_last_checkpoint_are_done_and_reported_again(tmp_path: Path) -> None:
    """What a kill leaves: metrics beyond the checkpoint, the last line cut."""
    whole = Toy()
    train(tmp_path / "whole", whole)
    crashed = Toy()

    def crash(step: int) -> None:
        if step == 9:
            raise RuntimeError("power cut")

    crashed.hook = crash
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "run", crashed)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 10, "lo')
    assert reported(tmp_path / "run")[-1]["step"] == 9
    resumed = Toy()
    train(tmp_path / "run", resumed, resume=True)
    assert resumed.seen == list(range(5, 12))
    assert torch.equal(resumed.weight, whole.weight)
    assert reported(tmp_path / "run") == reported(tmp_path / "whole")


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    task = Toy()
    train(tmp_path / "run", task)
    again = Toy()
    assert train(tmp_path / "run", again, resume=True).step == 12
    assert again.seen == [] and again.done == 12 and torch.equal(again.weight, task.weight)
    longer = Toy()
    assert train(tmp_path / "run", longer, resume=True, steps=14).step == 14
    assert longer.seen == [12, 13]


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    often, never = Toy(), Toy()
    train(tmp_path / "often", often, eval_every=1)
    seed_everything(3)
    train(tmp_path / "never", never, eval_every=100)
    assert torch.equal(often.weight, never.weight)


def test_minutes_end_a_run_with_a_checkpoint_and_a_model(tmp_path: Path) -> None:
    task = Toy()
    task.hook = lambda _: time.sleep(0.02)
    result = train(tmp_path / "run", task, max_minutes=0.05 / 60)
    assert result.reason == "time" and 0 < result.step < 12 and result.model is not None
    assert (tmp_path / "run" / "model" / "weight.json").exists()
    assert train(tmp_path / "run", Toy(), resume=True).reason == "finished"


def test_sigterm_saves_and_stops_like_ctrl_c(tmp_path: Path) -> None:
    task = Toy()
    task.hook = lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM)
    assert train(tmp_path / "run", task).reason == "terminated"
    assert (tmp_path / "run" / "checkpoints" / "step-0000007").is_dir()


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    task = Toy()

    def twice(step: int) -> None:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    task.hook = twice
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", task)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(task.seen) == 6
    assert train(tmp_path / "run", Toy(), resume=True).reason == "finished"


def test_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[loop.RunResult] = []
    worker = threading.Thread(target=lambda: results.append(train(tmp_path / "run", Toy())))
    worker.start()
    worker.join()
    assert results[0].reason == "finished"


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_nan_is_named_and_never_saved(tmp_path: Path, log_every: int) -> None:
    task = Toy()
    task.nan_at = 7
    with pytest.raises(InputError, match=r"loss nan at step 8.*step 5"):
        train(tmp_path / "run", task, log_every=log_every)
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000005"]
    assert not (tmp_path / "run" / "model").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is missing")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", Toy(), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    steps, losses = loss_curve(tmp_path / "run" / "metrics.jsonl")
    assert [event.step for event in events.Scalars("loss")] == steps
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_without_tensorboard_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(tmp_path / "run", Toy(), tensorboard=True)
    assert "tensorboard is not installed" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 6
