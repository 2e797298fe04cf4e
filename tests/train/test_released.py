"""`make model` at toy size: every stage from phantoms to samples, taken up where it stopped, from a bare checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.engine.checkpoint import load_gpt, load_tokenizer, read_config
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.train import released
from retinar.train.budget import affordable_steps, seconds_per_step
from retinar.train.data.phantoms import write_phantoms
from retinar.train.released import Release, main, release

ROOT = Path(__file__).resolve().parents[2]
SETS = (
    "tokenizer.model.image_size=32",
    "tokenizer.model.ch=8",
    "tokenizer.model.z_channels=8",
    "tokenizer.model.codebook_size=16",
    "tokenizer.crop_size=16",
    "tokenizer.perceptual=none",
    "tokenizer.precision=fp32",
    "tokenizer.steps=4",
    "tokenizer.quantize_from=1",
    "tokenizer.tensorboard=false",
    "tokenizer.meters=false",
    "gpt.model.n_layer=1",
    "gpt.model.n_head=2",
    "gpt.model.dim=16",
    "gpt.model.multiple_of=16",
    "gpt.batch_size=4",
    "gpt.tensorboard=false",
    "gpt.meters=false",
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "ddr"
    write_phantoms(
        folder, {"train": {"healthy": 4, "npdr": 4}, "valid": {"healthy": 1, "npdr": 1}}, size=32, progress=silent
    )
    return folder


def asked(photographs: Path, out: Path, **changes: Any) -> Release:
    values: dict[str, Any] = {"variant": "cpu", "device": "cpu", "minutes": 0.04, "sets": SETS, "count": 1}
    return Release(data=photographs, out=out, **{**values, **changes})


class Stopped(Exception):
    """Stands for a kill: nothing after it runs."""


def test_from_photographs_to_samples_with_a_kill_in_every_stage(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for name in ("prepare", "train_tokenizer", "encode_folder", "train_gpt", "export_release", "generate_folder"):
        original = getattr(released, name)

        def die(*arguments: Any, original: Any = original, **keywords: Any) -> None:
            original(*arguments, **keywords)
            raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(released, name, die)
            with pytest.raises(Stopped):
                release(asked(photographs, out), silent)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["steps"]["tokenizer"] == 4  # by hand
    assert 1 <= plan["steps"]["gpt"] <= 1000  # measured
    summary = release(asked(photographs, out), silent)
    assert json.loads((out / "plan.json").read_text()) == plan

    assert read_config(out / "model")["classes"] == ["healthy", "npdr"]
    assert read_config(out / "model")["release"]["training"]["tokenizer"]["steps"] == 4
    assert load_gpt(out / "model", dtype=None).output.weight.dtype == torch.bfloat16
    assert load_tokenizer(out / "model", dtype=None).quant_conv.weight.dtype == torch.bfloat16
    assert "healthy, npdr" in (out / "model" / "README.md").read_text()
    assert len(list((out / "samples" / "images").glob("*/*.png"))) == 2
    assert Path(summary["sheet"]).is_file() and summary["bytes"] < released.MAX_RELEASE_BYTES
    assert "fits into 25 MB" in capsys.readouterr().err

    with pytest.raises(InputError, match="choose another --out"):
        release(asked(photographs, out, sets=(*SETS, "gpt.seed=1")), silent)


@pytest.mark.parametrize("reason", ["interrupted", "terminated"])
def test_a_training_that_was_stopped_stops_everything(
    reason: Any, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retinar.train.loop import RunResult

    stopped = RunResult(2, 4, reason, {}, None)
    monkeypatch.setattr(released, "train_tokenizer", lambda *_, **__: stopped)
    with pytest.raises(KeyboardInterrupt):
        release(asked(photographs, tmp_path / "out"), silent)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["done"] == {}


def test_bad_input_is_one_sentence_and_exit_code_2(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    cases = {
        "no --data": ["--data", "", "--out", "x"],
        "folder of photographs": ["--data", str(tmp_path / "absent"), "--out", str(tmp_path / "x")],
        "other files": ["--data", str(photographs), "--out", str(tmp_path / "mine")],
        "above 0": ["--data", str(photographs), "--out", str(tmp_path / "x"), "--minutes", "0"],
        "tokenizer.KEY=VALUE": ["--data", str(photographs), "--out", str(tmp_path / "y"), "--set", "steps=4"],
        "--perceptual-weights": ["--data", str(photographs), "--out", str(tmp_path / "z"), "--set", *SETS[:5]],
    }
    for words, arguments in cases.items():
        assert main([*arguments, "--variant", "cpu", "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert words in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_steps_that_the_time_pays_for() -> None:
    assert affordable_steps(10, [(1.0, 0.5)], 5000) == 1200
    assert affordable_steps(10, [(0.6, 0.5), (0.4, 1.0)], 5000) == int(600 / 0.7)
    assert affordable_steps(10, [(1.0, 0.5)], 800) == 800
    assert affordable_steps(0.001, [(1.0, 5.0)], 800) == 1


def test_measuring_takes_back_what_it_draws() -> None:
    class Drawing:
        name = "drawing"

        def __init__(self) -> None:
            self.calls: list[int] = []

        def step(self, step: int) -> dict[str, torch.Tensor]:
            self.calls.append(step)
            return {"loss": torch.rand(())}

    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    task: Any = Drawing()
    assert seconds_per_step(task, range(3)) > 0
    assert task.calls == [0, 1, 0, 1, 2]
    assert torch.equal(torch.rand(2), wanted)


def test_a_bare_checkout_is_enough() -> None:
    """Nothing but torch, numpy, pillow and safetensors is imported on the way (lpips only with its loss)."""
    block = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tyro", "rich", "tensorboard", "scipy", "torchvision", "lpips", "cleanfid"}:
            raise ImportError(f"{name} is absent")
sys.meta_path.insert(0, Absent())
import retinar.train.released
"""
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_missing_vgg_weights_are_named_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--data", str(tmp_path), "--out", str(out), "--variant", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--perceptual-weights" in said and "tokenizer.perceptual=none" in said
    assert not (out / "prepared").exists()
