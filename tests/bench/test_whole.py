"""A whole run: what is wrong has no time, what does not fit is named, and it works from a bare checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.bench import gpu, record, whole
from retinar.bench.baselines import kernels as baselines
from retinar.bench.deadline import Deadline
from retinar.bench.whole import Run
from retinar.engine.progress import silent
from retinar.kernels.dispatch import REGISTRY, Implementation
from retinar.kernels.launch import triton_missing

ROOT = Path(__file__).resolve().parents[2]
OP = "cfg_mix"


@pytest.fixture
def wrong_backend() -> Iterator[str]:
    """cfg_mix with a backend that is off by a thousandth, and one that cannot be called."""
    op = REGISTRY[OP]
    op.register("hasty", Implementation(lambda cond, null, scale: (null + (cond - null) * scale) * 1.001))
    op.register("broken", Implementation(lambda cond, null, scale: cond.no_such_thing))
    yield "hasty"
    del op.backends["hasty"], op.backends["broken"]


def run(out: Path, seconds: float = 60.0, only: str | None = OP) -> dict[str, Any]:
    return Run("cpu", out, Deadline(seconds), exercise=True, seconds=0.0, only=only, progress=silent).all()


def test_a_wrong_backend_is_refused_and_has_no_time(tmp_path: Path, wrong_backend: str) -> None:
    content = run(tmp_path)
    failed = content["tests"]["failed"]
    assert not content["tests"]["passed"] and len(failed) >= 2
    assert any(f"float32, {wrong_backend} on cpu" in sentence and "allowed are" in sentence for sentence in failed)
    assert any("broken on cpu" in sentence and "no_such_thing" in sentence for sentence in failed)
    timed = {row["backend"] for row in content["rows"]}
    assert "reference" in timed and "torch eager" in timed and not timed & {wrong_backend, "broken"}


def test_the_exit_code_says_that_something_is_wrong(
    tmp_path: Path, wrong_backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--only", OP, "--out", str(tmp_path)]
    assert gpu.main(flags) == 1
    told = capsys.readouterr().out
    assert told.count("WRONG  cfg_mix (") >= 2 and "EXERCISE" in told and str(tmp_path) in told
    del REGISTRY[OP].backends["hasty"], REGISTRY[OP].backends["broken"]
    try:
        assert gpu.main(flags) == 0
    finally:  # the fixture takes them away
        REGISTRY[OP].backends |= dict.fromkeys(("hasty", "broken"), REGISTRY[OP].backends["reference"])


def test_without_time_everything_is_named_and_nothing_reported(tmp_path: Path) -> None:
    content = run(tmp_path, seconds=0.0)
    assert content["rows"] == [] and content["tests"]["checked"] <= 1
    told = "; ".join(content["left_out"])
    assert f"not checked, or not in all cases, for lack of time: {OP} reference float32" in told
    assert f"{OP}-forward-torch_eager" in told and f"{OP}-forward-reference (not checked)" in told
    (path,) = tmp_path.rglob("*.json")
    assert record.load(path)["left_out"] == content["left_out"]


def test_time_that_runs_out_on_the_way_leaves_what_was_measured(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        return now[0]

    original = whole.time_op
    one = Run("cpu", tmp_path, Deadline(100.0, clock), exercise=True, seconds=0.0, only="cfg_", progress=silent)

    def slow(*args: Any, **options: Any) -> dict[str, object]:
        now[0] += 30.0
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "time_op", slow)
        content = one.all()
    assert len(content["rows"]) == 2 and not content["tests"]["failed"]
    assert any("not timed for lack of time" in sentence for sentence in content["left_out"])
    assert content["minutes"] == pytest.approx(1.0)


def test_a_baseline_that_fails_is_absent_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        def call(inputs: Any) -> Any:
            raise RuntimeError("no kernel image is available")

        return call

    bad = baselines.Baseline("Other", None, lambda device, size: None, fails)
    monkeypatch.setattr(baselines, "BASELINES", (*baselines.BASELINES, bad))
    content = run(tmp_path)
    assert content["tests"]["passed"]
    assert {"name": OP, "baseline": "Other", "reason": "RuntimeError: no kernel image is available"} in content[
        "absent"
    ]


def test_a_phase_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("oops")

    monkeypatch.setattr(whole, "plan", fails)
    content = run(tmp_path, only="linear")
    assert content["tests"]["checked"] > 0 and any("time: KeyError" in each for each in content["tests"]["failed"])


def test_a_lost_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Run("cuda", tmp_path, Deadline(10.0), progress=silent)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    one.still_there("swiglu (rows=1)")
    assert one.lost and one.wrong == [
        "the device was lost (CUDA error: an illegal memory access was encountered) after: swiglu (rows=1); the rest "
        "was not run"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: its absence cannot be shown")
def test_gpu_without_a_gpu_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "CUDA" in told.err and told.out == ""
    assert not list(tmp_path.iterdir())


def test_exercises_do_not_lie_among_results() -> None:
    assert gpu.OUT["cpu"].parts[0] == "build" and gpu.OUT["cuda"] == Path("bench/results")
    assert gpu.MINUTES["cuda"] * 60 + gpu.GRACE_SECONDS < 9 * 60


def test_the_command_makes_its_own_environment(tmp_path: Path) -> None:
    """As `make gpu DEVICE=cpu` runs it, on one op: Triton's interpreter is on, and the GPU kernels are timed."""
    command = [sys.executable, "-m", "retinar.bench.gpu", "--device", "cpu", "--only", "swiglu_packed"]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = record.load(next(tmp_path.rglob("*.json")))
    assert content["exercise"] and content["kind"] == "cpu" and content["tests"]["passed"]
    timed = {(row["backend"], row["direction"]) for row in content["rows"]}
    both = ("forward", "backward")
    wanted = {"reference", "torch eager", "torch.compile", *(["triton"] if triton_missing() is None else [])}
    assert {(name, direction) for name in wanted for direction in both} <= timed
    assert str(content["command"]).startswith("python -m retinar.bench.gpu --device cpu")


BARE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

BLOCKED = set(sys.argv[2].split(","))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import tempfile
from pathlib import Path
from retinar.bench import gpu
code = gpu.main(["--device", "cpu", "--only", "cfg_mix", "--out", sys.argv[1]])
from retinar.bench import profile_step, training, whole
task = training.make_task(training.step_config("cpu"), Path(sys.argv[1]) / "codes")
assert task.step(0)["loss"] > 0
run = whole.Run("cpu", Path(sys.argv[1]), whole.Deadline(9.0), exercise=True)
run.engine()
run.sampling()
assert ["needs the package PIL" in each for each in run.left_out] == [True, True], run.left_out
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
raise SystemExit(code)
"""


def test_a_bare_checkout_is_enough(tmp_path: Path) -> None:
    """torch, numpy (and triton): everything else that a whole installation has is blocked."""
    blocked = (
        "tyro,rich,safetensors,PIL,tensorboard,lpips,scipy,hypothesis,torchvision,cleanfid,pytest_benchmark,wandb,"
        "liger_kernel,flash_attn,starlette"
    )
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path), blocked],
        cwd=ROOT, env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_whole_exercise(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retinar.bench.gpu", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.rglob("*.json")
    content = json.loads(path.read_text())
    from retinar.kernels.spec import ALL_SPECS

    assert {row["name"] for row in content["rows"]} >= {spec.name for spec in ALL_SPECS} | {"sample", "decode"}
    assert content["profile"]["missing"] == [] and content["minutes"] < 6
    assert content["sampling"]["step"]["missing"] == [] and len(content["sampling"]["rows"]) == 6
