"""Runs of several processes equal those of one; killed ones go on where they stopped, in any number of processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retinar.engine.errors import InputError
from retinar.engine.model import to_upstream_state_dict
from retinar.train.code_files import CodeSet
from retinar.train.metrics_log import read_metrics
from retinar.train.order import own_rows
from retinar.train.world import World
from tests.train.parallel_run import tokenizer, train, train_run
from tests.train.pictures import write_pictures
from tests.train.processes import finish, run_processes, start_processes
from tests.train.tiny import tiny_config, write_codes

CPU = torch.device("cpu")
MODES = {2: ("ddp", "fsdp", "sdp"), 4: ("hsdp",)}
RUN = ("tests.train.parallel_run", "train")


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors together, over the norm of the wanted ones."""
    assert found.keys() == wanted.keys()
    error = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (error / sum(float(tensor.double().square().sum()) for tensor in wanted.values())) ** 0.5


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codes(tmp_path_factory.mktemp("codes") / "codes", images=21)


@pytest.fixture(scope="module")
def alone(codes: Path) -> dict[str, Any]:
    return train(World(CPU), CodeSet(codes))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), train=9)


@pytest.fixture(scope="module")
def spread(codes: Path, golden: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each mode gives, with two processes, and four for the hybrid mesh."""
    out = tmp_path_factory.mktemp("modes")
    data = (str(out), str(codes), str(golden), str(pictures))
    for count, names in MODES.items():
        run_processes(count, "tests.train.parallel_run", "modes", *data, *names)
    return {name: torch.load(out / f"{name}.pt") for names in MODES.values() for name in names}


@pytest.mark.parametrize("mode", [name for names in MODES.values() for name in names])
def test_every_mode_trains_as_one_process(mode: str, spread: dict[str, Any], alone: dict[str, Any]) -> None:
    """20 steps with accumulation and the average: losses, gradient norms, weights, moments, validation."""
    found = spread[mode]["train"]
    torch.testing.assert_close(found["values"], alone["values"], rtol=1e-5, atol=0)
    assert found["valid"] == pytest.approx(alone["valid"], rel=1e-5)
    assert distance(found["model"], alone["model"]) < 1e-4
    assert distance(found["ema"], alone["ema"]) < 1e-4
    for name, moments in alone["optimizer"].items():
        assert found["optimizer"][name]["step"] == moments["step"] == 20
    for moment in ("exp_avg", "exp_avg_sq"):
        own, other = ({n: state[moment] for n, state in each["optimizer"].items()} for each in (found, alone))
        assert distance(own, other) < 1e-3
    assert not torch.equal(alone["values"][0], alone["values"][-1])


@pytest.mark.parametrize("mode", [name for names in MODES.values() for name in names])
def test_every_mode_follows_the_golden_trajectory(mode: str, spread: dict[str, Any], golden: Path) -> None:
    """As tests/engine/test_golden_gpt.py asks of one process."""
    training, found = load_file(golden / "gpt_training.safetensors"), spread[mode]["golden"]
    torch.testing.assert_close(found["loss"].float(), training["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["grad_norm"].float(), training["grad_norm"], rtol=1e-5, atol=0)
    final = to_upstream_state_dict(found["final"])
    for key, tensor in final.items():
        error = tensor - training[f"final.{key}"]
        assert error.abs().max() < 1e-4 and error.square().mean().sqrt() < 1e-6, key


@pytest.mark.parametrize("mode", [name for names in MODES.values() for name in names])
def test_every_mode_trains_the_tokenizer_as_one_process(mode: str, spread: dict[str, Any], pictures: Path) -> None:
    same_tokenizer(spread[mode]["tokenizer"], tokenizer(World(CPU), str(pictures)))


def test_revived_codes_are_those_of_one_process(spread: dict[str, Any], pictures: Path) -> None:
    same_tokenizer(spread["ddp"]["revived"], tokenizer(World(CPU), str(pictures), revive_after=2))


def same_tokenizer(found: dict[str, Any], alone: dict[str, Any]) -> None:
    torch.testing.assert_close(found["values"], alone["values"], rtol=1e-5, atol=1e-7)
    assert found["figures"] == pytest.approx(alone["figures"], rel=1e-5)
    floats = {name: tensor for name, tensor in alone["weights"].items() if tensor.is_floating_point()}
    assert distance({name: found["weights"][name] for name in floats}, floats) < 1e-4


def test_replicas_agree_with_a_discriminator(spread: dict[str, Any]) -> None:
    assert spread["ddp"]["agree"]


@pytest.mark.parametrize("point", [("step", "7"), ("write", "2")], ids=" ".join)
def test_one_process_killed(point: tuple[str, str], codes: Path, whole: Path, tmp_path: Path) -> None:
    """Every dropout on, two processes: the others end by themselves, and the resumed run ends bitwise as the whole."""
    run, settings = tmp_path / "run", json.dumps(SETTINGS)
    exits, told = finish(start_processes(2, *RUN, str(codes), str(run), settings, *point), seconds=120)
    assert exits[1] == -signal.SIGKILL and exits[0] not in (0, None), told
    assert not (run / "model").exists()
    run_processes(2, *RUN, str(codes), str(run), settings)
    expected, found = (load_file(each / "model" / "model.safetensors") for each in (whole, run))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert reported(run) == reported(whole)


SETTINGS = {"parallel": "fsdp", "keep_last": 1, "keep_best": False}


@pytest.fixture(scope="module")
def whole(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_processes(2, *RUN, str(codes), str(run), json.dumps(SETTINGS))
    return run


def reported(run: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_s", "mfu", "peak_memory_bytes", "data_wait")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run / "metrics.jsonl")]


def test_two_one_two_processes(codes: Path, tmp_path: Path) -> None:
    """Without dropout a run may change its number of processes and its mode: losses and weights stay those of one."""
    base = {"quiet": True, "optim": None, "log_every": 1}
    quiet = {key: value for key, value in base.items() if value is not None}
    one, several = tmp_path / "one", tmp_path / "several"
    for steps in (7, 14, 20):
        train_run(str(codes), str(one), json.dumps({**quiet, "steps": steps}))
    for processes, steps, mode in ((2, 7, "fsdp"), (1, 14, "ddp"), (2, 20, "ddp")):
        settings = json.dumps({**quiet, "steps": steps, "parallel": mode})
        if processes == 1:
            train_run(str(codes), str(several), settings)
        else:
            run_processes(processes, *RUN, str(codes), str(several), settings)
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (one, several)]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights = [load_file(run / "model" / "model.safetensors") for run in (several, one)]
    assert distance(*weights) < 1e-4


def test_rows_are_shared_without_repeats() -> None:
    config = tiny_config(batch_size=24, accumulation=2)
    rows = [own_rows(config, World(CPU, rank=rank, size=3)) for rank in range(3)]
    assert sorted(int(row) for own in rows for part in own for row in part) == list(range(24))
    assert {int(row) for own in rows for row in own[0]} == set(range(12)), "a part is a share of the batch"
    with pytest.raises(InputError, match=r"multiple of the 5 processes, found 24 / 2"):
        own_rows(config, World(CPU, size=5))
