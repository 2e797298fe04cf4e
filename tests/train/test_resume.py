"""Runs killed by SIGKILL anywhere and resumed end bitwise as those left alone (fp32, CPU, every dropout on)."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retinar.engine.progress import silent
from retinar.train.gpt import train_gpt
from retinar.train.metrics_log import read_metrics
from tests.conftest import ROOT
from tests.train.tiny import tiny_config, write_codes


def command(codes: Path, run: Path, *point: str) -> list[str]:
    return [sys.executable, "-m", "tests.train.killed_run", str(codes), str(run), *point]


def go_on(codes: Path, run: Path) -> None:
    train_gpt(tiny_config(keep_last=1), codes, run, valid=codes, resume=True, progress=silent)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def reported(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(codes, an uninterrupted run on them)."""
    folder = tmp_path_factory.mktemp("whole")
    codes = write_codes(folder / "codes")
    go_on(codes, folder / "run")
    return codes, folder / "run"


def assert_same(run: Path, whole_run: Path) -> None:
    expected, found = weights(whole_run), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert reported(run) == reported(whole_run)
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["step-0000014"]


@pytest.mark.parametrize("point", [("step", "7"), ("tensors", "2"), ("rename", "3"), ("prune", "1")], ids=" ".join)
def test_killed_at(point: tuple[str, str], whole: tuple[Path, Path], tmp_path: Path) -> None:
    codes, whole_run = whole
    killed = subprocess.run(command(codes, tmp_path / "run", *point), cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "model").exists()
    go_on(codes, tmp_path / "run")
    assert_same(tmp_path / "run", whole_run)


def test_killed_at_random_moments(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed from outside, whatever it is doing, until it gets through."""
    codes, whole_run = whole
    run = tmp_path / "run"
    moments = random.Random(11)
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(command(codes, run), cwd=ROOT, stderr=subprocess.DEVNULL)
        # From the first sign of training on; the whole of it takes a fraction of a second.
        while process.poll() is None and not (run / "config.json").exists():
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.5))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    go_on(codes, run)
    assert_same(run, whole_run)
    assert kills, "no process was still running when it was killed"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_stopped_from_outside(sent: signal.Signals, code: int, whole: tuple[Path, Path], tmp_path: Path) -> None:
    """The command line: Ctrl-C and a preempted machine's SIGTERM save and say how to go on; the run can be resumed."""
    codes, _ = whole
    run = tmp_path / "run"
    base = [sys.executable, "-m", "retinar", "train", "gpt", "--data", str(codes), "--out", str(run)]
    settings = ["model.dim=32", "model.n_layer=2", "batch_size=8", "steps=100000", "log_every=1", "device=cpu"]
    process = subprocess.Popen(
        [*base, "--recipe", "fundus-tiny", "--set", *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while len(read_metrics(run / "metrics.jsonl")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    _, told = process.communicate(timeout=300)
    assert process.returncode == code, told
    assert "--resume" in told and "saved at step" in told
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert step >= 3
    done = subprocess.run([*base, "--resume", "--set", f"steps={step + 2}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, step + 3))
    assert (run / "model" / "config.json").exists()
