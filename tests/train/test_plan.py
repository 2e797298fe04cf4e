"""The memory plan: its bytes are those of real runs of several processes, and its advice is what it found."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.train import plan as planning
from retinar.train.code_files import CodeSet
from retinar.train.config import apply_overrides
from retinar.train.plan import FIXED, FRAGMENTATION, GIB, Plan, plan
from retinar.train.recipes import gpt_recipe
from retinar.train.rehearsal import Memory, Rehearsal, pretended
from retinar.train.world import World
from tests.conftest import ROOT
from tests.train.plan_run import BATCH, CODES, measure, odd_config
from tests.train.tiny import quiet_config, write_codes

Setting = tuple[str, str, int]
"""Mode, activation checkpointing, accumulation."""
REAL: dict[int, list[Setting]] = {
    2: [("ddp", "none", 1), ("ddp", "selective", 2), ("fsdp", "none", 1), ("fsdp", "full", 2), ("sdp", "selective", 1)],
    4: [("hsdp", "none", 2), ("fsdp", "full", 1)],
}


def rehearsed(size: int, setting: Setting, **changes: Any) -> Memory:
    """The plan's figures as a CPU counts them: to the byte, and without what GPU kernels take for themselves."""
    config = odd_config(*setting, **changes)
    with pretended(size):
        rehearsal = Rehearsal(config, gpus=size, gpus_per_machine=8)
        _, checkpointing, accumulation = setting
        images = BATCH // size // accumulation
        return rehearsal.trace(checkpointing, images, accumulation, block=1, scratch={})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "codes"
    return write_codes(folder, images=32, tokenizer_config={"codebook_size": CODES})


def test_bytes_are_those_of_real_runs(codes: Path, tmp_path: Path) -> None:
    """Processes over gloo: parameters, gradients, optimizer state, averages and the peak, to the byte, of the process
    that holds most."""
    command = [sys.executable, "-m", "tests.train.plan_run", str(tmp_path), str(codes), json.dumps(REAL)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for size, settings in REAL.items():
        for setting in settings:
            found = json.loads((tmp_path / f"{'-'.join(map(str, (size, *setting)))}.json").read_text())
            assert len(found) == size
            memory = dataclasses.asdict(rehearsed(size, setting))
            for name in ("parameters", "gradients", "optimizer", "ema", "peak"):
                assert memory[name] == max(process[name] for process in found), (size, setting, name)
            assert sum(memory["at_peak"].values()) == memory["peak"]


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        (("ddp", "none", 1), {"ema_decay": None}),
        (("ddp", "selective", 2), {}),
        (("ddp", "full", 4), {"precision": "fp32"}),
    ],
)
def test_peak_of_one_process(setting: Setting, changes: dict[str, Any], codes: Path) -> None:
    config = odd_config(*setting, **changes)
    found = measure(World(torch.device("cpu")), config, CodeSet(codes))
    memory = dataclasses.asdict(rehearsed(1, setting, **changes))
    assert {name: memory[name] for name in found} == found


def test_a_trace_can_be_repeated() -> None:
    with pretended(2):
        rehearsal = Rehearsal(odd_config("fsdp", "none", 1), gpus=2, gpus_per_machine=8)
        first = rehearsal.trace("selective", 2, 2)
        rehearsal.trace("none", 4, 1)
        assert rehearsal.trace("selective", 2, 2) == first
        assert rehearsal.trace("selective", 2, 3) == first  # a third part is like the second


def test_one_group_of_shards_is_fsdp() -> None:
    """Why the plan does not rehearse it twice."""
    with pretended(2):
        found = []
        for mode, replicas in (("fsdp", None), ("hsdp", 1)):
            config = dataclasses.replace(odd_config(mode, "none", 1), replicas=replicas)
            found.append(Rehearsal(config, gpus=2, gpus_per_machine=8).trace("none", 4, 1))
    assert found[0] == found[1]


def test_nothing_is_allocated() -> None:
    """A model of 0.5 G parameters, 8 GB with its state."""
    config = gpt_recipe("llamagen-xl")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=3, n_head=32, dim=3200))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = Rehearsal(config, gpus=1, gpus_per_machine=1).trace("full", 32, 1)
    assert memory.parameters == 4 * config.model.parameter_count > 1.9e9
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=1e-6)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 0.3 * GIB


@pytest.fixture(scope="module")
def small() -> Plan:
    """Eight GPUs on two machines, with room for everything."""
    config = odd_config("ddp", "none", 1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=3))
    return plan(config, gpus=8, gpu_memory=4, gpus_per_machine=4, progress=silent)


def test_more_recomputation_and_more_shards_take_less(small: Plan) -> None:
    peaks = {(row.parallel, row.activation_checkpointing): row.memory.peak for row in small.rows}
    assert len(peaks) == len(small.rows) == 12
    for mode in ("ddp", "sdp", "fsdp", "hsdp"):
        assert peaks[mode, "full"] < peaks[mode, "selective"] < peaks[mode, "none"], mode
    for checkpointing in ("none", "selective", "full"):
        assert peaks["fsdp", checkpointing] < peaks["sdp", checkpointing] < peaks["ddp", checkpointing]
    parameters = {row.parallel: row.memory.parameters for row in small.rows}
    assert parameters["fsdp"] == parameters["sdp"] < parameters["hsdp"] < parameters["ddp"]
    assert {row.replicas for row in small.rows if row.parallel == "hsdp"} == {2}
    for row in small.rows:
        assert row.needed == int(row.memory.peak * (1 + FRAGMENTATION) + FIXED) and row.fits and not row.verified


def test_the_fastest_that_fits_is_recommended(small: Plan) -> None:
    assert small.best is not None
    assert (small.best.parallel, small.best.activation_checkpointing) == ("ddp", "none")
    ordered = sorted(small.rows, key=lambda row: row.slowness)
    modes = [row.parallel for row in ordered]
    assert modes == ["ddp", "sdp", "hsdp", "fsdp"] * 3
    assert [row.activation_checkpointing for row in ordered[::4]] == ["none", "selective", "full"]


def test_only_as_much_accumulation_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the memory, the search finds the least accumulation that fits, and tries no more than it must."""
    config = quiet_config(batch_size=8, accumulation=1, precision="bf16")
    rehearsal = Rehearsal(config, gpus=1, gpus_per_machine=1)
    needed = {
        count: int(rehearsal.trace("none", 8 // count, count).peak * (1 + FRAGMENTATION) + FIXED)
        for count in (1, 2, 4, 8)
    }
    traced: list[int] = []
    trace = Rehearsal.trace

    def noted(self: Rehearsal, checkpointing: Any, micro_batch: int, parts: int) -> Memory:
        traced.append(parts)
        return trace(self, checkpointing, micro_batch, parts)

    monkeypatch.setattr(Rehearsal, "trace", noted)
    monkeypatch.setattr(planning, "RECOMPUTE", ("none",))
    assert needed[1] > needed[2] > needed[8]
    for limit in [*needed.values(), min(needed.values()) - 1, int(FIXED) // 2]:
        traced.clear()
        found = plan(config, gpus=1, gpu_memory=limit / GIB, progress=silent)
        least = next((count for count in needed if needed[count] <= limit), None)
        assert (found.best.accumulation if found.best else None) == least
        assert [row.accumulation for row in found.rows] == traced
        assert [row.needed for row in found.rows] == [needed[count] for count in traced]
        if limit == needed[1]:
            assert traced == [1]
        if limit < FIXED:
            assert traced == [1]  # nothing can help


def test_the_config_as_it_is_gets_a_row() -> None:
    config = quiet_config(batch_size=24, accumulation=6, attention_backend="sdpa")
    found = plan(config, gpus=1, gpu_memory=4, progress=silent)
    counts = [(row.accumulation, row.micro_batch) for row in found.rows]
    assert counts == [(1, 24), (6, 4)] * 3
    assert {row.parallel for row in found.rows} == {"ddp"}
    assert found.best is not None and found.best.accumulation == 1
    assert "one process" in found.text() and "parallel=" not in found.text()


def test_text_and_json(small: Plan) -> None:
    values = small.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["best"] == values["rows"][0] and values["rows"][0]["verified"] is False
    lines = small.text().splitlines()
    assert lines[2].split()[:4] == ["mode", "checkpointing", "parts", "images"] and "ema" in lines[2]
    assert len([line for line in lines if line.endswith(" yes")]) == 12
    assert any(line.startswith("hsdp 2 x 4") for line in lines)
    assert "--set parallel=ddp activation_checkpointing=none accumulation=1" in small.text()
    assert "unverified" in small.text() and "torch.compile is not traced" in small.text()
    nothing = dataclasses.replace(small, rows=tuple(dataclasses.replace(row, fits=False) for row in small.rows))
    assert nothing.best is None and nothing.to_dict()["best"] is None
    assert "Nothing fits: the least is 1.5 GiB" in nothing.text()


@pytest.mark.parametrize(
    ("changes", "asked", "sentence"),
    [
        ({}, {"gpus": 0}, "--gpus of at least 1, found 0"),
        ({}, {"gpus_per_machine": 0}, "--gpus-per-machine of at least 1, found 0"),
        ({}, {"gpu_memory": 0.0}, "--gpu-memory above 0 GiB, found 0"),
        ({}, {"gpu_memory": -80.0}, "--gpu-memory above 0 GiB, found -80"),
        ({}, {"gpu_memory": float("nan")}, "--gpu-memory above 0 GiB, found nan"),
        ({}, {"gpus": 3}, "a multiple of --gpus 3 times accumulation 2, found 8"),
        ({"accumulation": 8}, {"gpus": 2}, "a multiple of --gpus 2 times accumulation 8, found 8"),
        ({"attention_backend": "abacus"}, {}, "attention_backend auto, "),
        ({"parallel": "hsdp", "replicas": 3}, {}, "replicas to divide --gpus 2, found 3"),
    ],
)
def test_what_cannot_be_planned(changes: dict[str, Any], asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(quiet_config(**changes), **{"gpus": 2, "gpu_memory": 80.0, "progress": silent, **asked})
    assert sentence in str(caught.value)
    assert not torch.distributed.is_initialized()


def test_other_processes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(2), pytest.raises(InputError, match="leave torchrun out"):
        plan(quiet_config(), gpus=2, gpu_memory=80.0, progress=silent)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave torchrun out"):
        plan(quiet_config(), gpus=2, gpu_memory=80.0, progress=silent)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), ("model.n_layer=24", "model.n_head=32", "model.dim=3200")])
def test_gpt_xl_and_3b(changes: tuple[str, ...]) -> None:
    """On eight GPUs of 80 GiB both train without sharding, and shards are an eighth of it."""
    config = apply_overrides(gpt_recipe("fundus-xl"), changes)
    found = plan(config, gpus=8, gpu_memory=80, progress=silent)
    whole = 4 * config.model.parameter_count
    for row in found.rows:
        assert row.memory.parameters == pytest.approx(whole if row.parallel == "ddp" else whole / 8, rel=1e-3)
        assert row.fits and row.memory.peak > 16 * row.memory.parameters / 4
    assert found.best is not None and found.best.parallel == "ddp"
