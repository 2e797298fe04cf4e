"""The run folder: whole checkpoints or none, damaged ones passed over, configs that may and may not change."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinar.engine.errors import InputError
from retinar.train import checkpoints as checkpoints_module
from retinar.train.config import defaults
from retinar.train.rng import preserved_rng, rng_state, seed_everything
from retinar.train.state import RunFolder, read_run
from tests.train.tiny import tiny_config

CONFIG = {"optim": {"lr": 0.1}, "steps": 10, "log_every": 1}


def start(path: Path, *, resume: bool = False, config: dict[str, Any] | None = None, codes: str = "a") -> RunFolder:
    return RunFolder.open(path, task="toy", config=config or CONFIG, inputs={"codes": codes}, resume=resume)


def tensors(value: float) -> dict[str, Any]:
    weight = torch.full((3, 5), value)
    return {"model": {"weight": weight, "scalar": torch.tensor(value)}, "optimizer": {"w.x": {"step": weight[0] * 2}}}


class Holder:
    """Something whose state is these tensors."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state is self.state


def save(run: RunFolder, step: int, state: dict[str, Any], loop: dict[str, Any], **options: Any) -> None:
    """A save to its end."""
    run.save(step, Holder(state), loop, **options)
    run.wait()


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        save(run, 7, tensors(1.5), {"window": [[7, {"loss": 0.1}]]}, keep_last=2)
        found = run.newest()
        assert found is not None and found.step == 7 and found.loop == {"window": [[7, {"loss": 0.1}]]}
        target = tensors(0.0)
        weight = target["model"]["weight"]
        run.load(found, Holder(target))
        assert weight.eq(1.5).all() and target["model"]["weight"] is weight, "read into the tensors in place"
        assert target["model"]["scalar"] == 1.5 and target["optimizer"]["w.x"]["step"].eq(3.0).all()


def test_random_states_return(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))

    seed_everything(5)
    random.gauss(0, 1), np.random.normal()  # leaves half a pair in both generators
    with start(tmp_path / "run") as run:
        save(run, 1, tensors(0.0), {}, keep_last=1)
        expected = draw()
        seed_everything(6)
        found = run.newest()
        assert found is not None
        run.load(found, Holder(tensors(0.0)))
        assert draw() == expected
    state = rng_state()
    with preserved_rng():
        draw()
    assert rng_state() == state
    assert json.loads(json.dumps(state)) == state


def test_keeps_the_last_n(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        for step in (1, 2, 3, 10):
            save(run, step, tensors(step), {}, keep_last=2)
        assert run.steps() == [10, 3]
        assert sorted(entry.name for entry in run.checkpoints.iterdir()) == ["step-0000003", "step-0000010"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with start(tmp_path / "run") as run:
        for step in (1, 2):
            save(run, step, tensors(step), {}, keep_last=2)
        newest = run.checkpoints / "step-0000002"
        (data,) = newest.glob("*.distcp")
        content = bytearray(data.read_bytes())
        if damage == "truncate":
            data.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            content[len(content) // 2] ^= 1
            data.write_bytes(content)
        elif damage == "remove":
            data.unlink()
        else:
            (newest / "checkpoint.json").write_text("{")
        found = run.newest()
        assert found is not None and found.step == 1
        told = capsys.readouterr().err
        assert "step-0000002" in told and "damaged" in told
        target = tensors(0.0)
        run.load(found, Holder(target))
        assert target["model"]["scalar"] == 1
        # The step is done again and saved where the damaged one was.
        save(run, 2, tensors(2), {}, keep_last=2)
        assert run.steps() == [2, 1]
        again = run.newest()
        assert again is not None and again.step == 2


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        save(run, 1, tensors(1), {}, keep_last=1)
        (run.checkpoints / "step-0000001" / ".metadata").unlink()
        for _ in range(2):  # a restart by itself must not begin anew
            with pytest.raises(InputError, match="1 damaged"):
                run.newest()


def test_a_disk_that_refuses_for_a_moment_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(tmp_path / "run") as run:
        save(run, 1, tensors(1), {}, keep_last=1)

        def refuse(_: Path) -> str:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints_module, "sha256_file", refuse)
            with pytest.raises(OSError, match="Input/output"):
                run.newest()
        found = run.newest()
        assert found is not None and found.step == 1


def test_half_written_checkpoints_are_ignored_and_removed(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        save(run, 1, tensors(1), {}, keep_last=1)
        partial = run.checkpoints / ".step-0000002.partial"
        partial.mkdir()
        (partial / "__0_0.distcp").write_bytes(b"half")
    with start(tmp_path / "run", resume=True) as run:
        assert not partial.exists()
        assert run.steps() == [1]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(checkpoints_module.dcp.FileSystemWriter):
        def write_data(self, *_: Any) -> Any:
            raise OSError(28, "No space left on device")

    with start(tmp_path / "run") as run:
        save(run, 1, tensors(1), {}, keep_last=1)
        monkeypatch.setattr(checkpoints_module.dcp, "FileSystemWriter", Full)
        with pytest.raises(InputError, match="No space left"):
            save(run, 2, tensors(2), {}, keep_last=1)
        assert [entry.name for entry in run.checkpoints.iterdir()] == ["step-0000001"]


def test_a_checkpoint_of_another_shape_is_a_sentence(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        save(run, 1, tensors(1), {}, keep_last=1)
        found = run.newest()
        assert found is not None
        with pytest.raises(InputError, match="step-0000001"):
            run.load(found, Holder({"model": {"weight": torch.zeros(4, 4)}}))
        with pytest.raises(InputError, match="nothere"):
            run.load(found, Holder({"model": {"nothere": torch.zeros(1)}}))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    start(tmp_path / "run").close()
    with pytest.raises(InputError, match="--resume"):
        start(tmp_path / "run")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(InputError, match=r"thesis\.tex"):
            start(tmp_path / "home", resume=resume)
    assert [entry.name for entry in (tmp_path / "home").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        start(tmp_path / "file")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with start(tmp_path / "run"), pytest.raises(InputError, match="another process"):
        start(tmp_path / "run", resume=True)
    start(tmp_path / "run", resume=True).close()


def test_resume_accepts_length_and_refuses_mathematics(tmp_path: Path) -> None:
    start(tmp_path / "run").close()
    longer = {**CONFIG, "steps": 20, "log_every": 5}
    start(tmp_path / "run", resume=True, config=longer).close()
    stored = read_run(tmp_path / "run")
    assert stored["config"] == longer and len(stored["resumed"]) == 1
    assert {"commit", "versions"} <= stored.keys() and stored["versions"]["torch"] == torch.__version__
    with pytest.raises(InputError, match=r"optim\.lr \(0\.1, now 0\.2\)"):
        start(tmp_path / "run", resume=True, config={**longer, "optim": {"lr": 0.2}})
    with pytest.raises(InputError, match="codes"):
        start(tmp_path / "run", resume=True, config=longer, codes="b")
    with pytest.raises(InputError, match="toy run"):
        RunFolder.open(tmp_path / "run", task="gpt", config=longer, inputs={}, resume=True)
    assert read_run(tmp_path / "run") == stored, "refused attempts leave no trace"


def test_resume_without_a_run_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with start(tmp_path / "run", resume=True) as run:
        assert run.newest() is None
    assert "starting at step 0" in capsys.readouterr().err


def test_a_broken_run_config_is_a_sentence(tmp_path: Path) -> None:
    start(tmp_path / "run").close()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        start(tmp_path / "run", resume=True)


def test_a_place_that_cannot_be_written_raises_oserror(tmp_path: Path) -> None:
    """The command line turns it into a sentence."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        start(tmp_path / "file" / "run")


def test_a_save_returns_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state at the call, whatever the training does meanwhile."""
    go_on = threading.Event()

    class Slow(checkpoints_module.dcp.FileSystemWriter):
        def write_data(self, *arguments: Any) -> Any:
            assert go_on.wait(60)
            return super().write_data(*arguments)

    monkeypatch.setattr(checkpoints_module.dcp, "FileSystemWriter", Slow)
    with start(tmp_path / "run") as run:
        state = tensors(1.0)
        run.save(1, Holder(state), {}, keep_last=1)
        assert run.steps() == []
        state["model"]["weight"].fill_(9.0)
        go_on.set()
        run.wait()
        found = run.newest()
        assert found is not None and found.step == 1
        target = tensors(0.0)
        run.load(found, Holder(target))
        assert target["model"]["weight"].eq(1.0).all()


def test_keeps_the_best_beside_the_last(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        for step, value in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
            save(run, step, tensors(step), {}, keep_last=1, value=value, keep_best=True)
        assert run.steps() == [5, 2]
        save(run, 6, tensors(6), {}, keep_last=1, value=1.0, keep_best=True)
        assert run.steps() == [6], "of equals the newest"
        save(run, 7, tensors(7), {}, keep_last=1)
        assert run.steps() == [7]
        for step, value in ((8, 1.0), (9, float("nan"))):
            save(run, step, tensors(step), {}, keep_last=1, value=value, keep_best=True)
        assert run.steps() == [9, 8], "what is no number is not the best"


def test_a_config_of_an_older_version_can_go_on(tmp_path: Path) -> None:
    """What it does not know had its default's value; another value now is another run."""
    start(tmp_path / "run").close()
    newer = {**CONFIG, "reduce_precision": "fp32"}
    known = {"reduce_precision": "fp32"}
    RunFolder.open(
        tmp_path / "run", task="toy", config=newer, inputs={"codes": "a"}, resume=True, defaults=known
    ).close()
    (tmp_path / "other").mkdir()
    start(tmp_path / "other" / "run").close()
    with pytest.raises(InputError, match="reduce_precision"):
        RunFolder.open(
            tmp_path / "other" / "run",
            task="toy",
            config={**CONFIG, "reduce_precision": "bf16"},
            inputs={"codes": "a"},
            resume=True,
            defaults=known,
        )


def test_defaults_of_a_config() -> None:
    found = defaults(tiny_config())
    assert found["reduce_precision"] == "fp32" and found["parallel"] == "ddp" and "model" not in found
