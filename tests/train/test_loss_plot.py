"""The picture at the end of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retinar.train.loss_plot import limits, loss_plot, smoothed

BLUE = (31, 95, 168)
ORANGE = (209, 96, 26)


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def count(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(-1) <= 8).sum())


def test_losses_validation_and_rate_are_drawn(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 9.7 / step, "lr": 1e-4} for step in range(1, 30)]
    plain = loss_plot(write(tmp_path / "plain", lines))
    assert plain == tmp_path / "plain" / "loss.png" and [each.name for each in plain.parent.glob("*.png")] == [
        "loss.png"
    ]
    assert count(plain, BLUE) > 500 and count(plain, ORANGE) == 0
    lines[9]["valid_loss"] = lines[19]["valid_loss"] = 3.0
    lines.append({"step": 30, "valid_loss": 2.0})  # an evaluation between two reports
    drawn = loss_plot(write(tmp_path / "valid", lines))
    assert drawn is not None and count(drawn, ORANGE) > 100
    assert Image.open(drawn).size == Image.open(plain).size == (1200, 900)
    lines[9]["valid_psnr"], lines[19]["valid_psnr"] = 20.0, 25.0  # a tokenizer's
    taller = loss_plot(write(tmp_path / "psnr", lines))
    assert taller is not None and Image.open(taller).height > 900


def test_a_run_of_one_line_and_one_that_has_logged_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = loss_plot(write(tmp_path / "one", [{"step": 5, "loss": 0.0}]))
    assert one is not None and count(one, BLUE) > 0
    assert loss_plot(write(tmp_path / "none", [{"step": 5, "valid_loss": 1.0}])) is None
    assert loss_plot(tmp_path / "nowhere") is None
    assert capsys.readouterr().err.count("nothing to plot") == 2


def test_without_matplotlib_there_is_a_line_and_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert loss_plot(write(tmp_path / "run", [{"step": 1, "loss": 1.0}])) is None
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_spike_does_not_press_the_rest_flat() -> None:
    losses = [5.0 - 0.01 * step for step in range(200)]
    losses[100] = 1e6
    low, high = limits(losses, [4.0])
    assert 2.8 < low < 3.1 and 5.0 < high < 5.3
    assert limits([2.0], [])[0] < 2.0 < limits([2.0], [])[1]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300))
def test_smoothing_stays_among_the_values_and_keeps_their_number(values: list[float]) -> None:
    found = smoothed(values)
    assert found.shape == (len(values),)
    assert found.min() >= min(values) - 1e-9 and found.max() <= max(values) + 1e-9


def test_smoothing_has_no_lag() -> None:
    line = np.arange(100.0)
    assert np.allclose(smoothed(line)[5:-5], line[5:-5])
