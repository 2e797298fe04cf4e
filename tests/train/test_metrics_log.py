"""The log's lines, and W&B where it is asked for: a module made here stands in for the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retinar.engine.errors import InputError
from retinar.train.metrics_log import MetricsLog, check_wandb, loss_curve, read_metrics, truncate_metrics


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package as `MetricsLog` uses it; ``runs`` collects what is started."""
    runs: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun(**settings))
        return runs[-1]

    module = SimpleNamespace(init=init, runs=runs, Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"loss": 2.0})
        assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
        log.write(2, {"loss": 1.0, "lr": 0.1})
        log.sync()
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # a crash
    assert loss_curve(path) == ([1, 2], [2.0, 1.0]) and loss_curve(path, "lr") == ([2], [0.1])
    truncate_metrics(path, 1)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_wandb_gets_every_line_and_goes_on_with_its_run(tmp_path: Path, wandb: Any) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    with MetricsLog(folder / "metrics.jsonl", wandb="fundus", config={"recipe": "x"}) as log:
        log.write(5, {"loss": 2.0})
    with pytest.raises(KeyboardInterrupt), MetricsLog(folder / "metrics.jsonl", wandb="fundus") as log:
        log.write(6, {"loss": 1.0})
        raise KeyboardInterrupt
    with MetricsLog(folder / "metrics.jsonl", wandb="another"):
        pass
    with MetricsLog(folder / "metrics.jsonl"):
        pass
    first, again, other = wandb.runs
    assert first.lines == [(5, {"loss": 2.0})] and again.lines == [(6, {"loss": 1.0})]
    assert [run.exit_code for run in wandb.runs] == [0, 1, 0]
    assert (first.settings["project"], first.settings["name"]) == ("fundus", "my-run")
    assert first.settings["config"] == {"recipe": "x"} and first.settings["dir"] == str(folder)
    assert first.settings["id"] == again.settings["id"] != other.settings["id"]
    assert {run.settings["resume"] for run in wandb.runs} == {"allow"}
    assert json.loads((folder / "wandb.json").read_text()) == {"project": "another", "id": other.settings["id"]}
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [5, 6]


def test_a_damaged_note_of_the_run_starts_a_new_one(tmp_path: Path, wandb: Any) -> None:
    (tmp_path / "wandb.json").write_text("[]")
    with MetricsLog(tmp_path / "metrics.jsonl", wandb="fundus"):
        pass
    assert len(wandb.runs[0].settings["id"]) == 12


def test_without_the_package_it_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert check_wandb(None) is None
    for ask in (lambda: check_wandb("fundus"), lambda: MetricsLog(tmp_path / "metrics.jsonl", wandb="fundus")):
        with pytest.raises(InputError, match=r"pip install wandb, or train without it: --set wandb=none"):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_of_wandb_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        raise wandb.Error("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError) as told:
        MetricsLog(tmp_path / "metrics.jsonl", wandb="fundus")
    assert "No API key configured. Use `wandb login` to log in: run `wandb login`" in str(told.value)
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []
