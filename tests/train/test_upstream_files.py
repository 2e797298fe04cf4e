"""LlamaGen's checkpoint files, written and read: layouts, numbering, and the shards of PyTorch's first FSDP."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from retinar.engine.checkpoint import load_gpt
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.upstream import from_upstream_state_dict, read_upstream, to_upstream_state_dict
from retinar.train.config import OptimConfig
from retinar.train.gpt import GPTTask
from retinar.train.upstream.adamw import numbering, state_dict, unpacked_moments, upstream_shapes
from retinar.train.upstream.checkpoints import Folders, FsdpStore, PtStore, UpstreamStore
from retinar.train.upstream.fsdp_files import ALIGNED, Shards, pieces, split
from retinar.train.upstream.log import Log
from retinar.train.upstream.source import Source
from retinar.train.world import World
from tests.conftest import ROOT
from tests.train.fsdp1_run import LAYERS, Model
from tests.train.processes import run_processes
from tests.train.tiny import tiny_config

ALONE = World(torch.device("cpu"))
CLONE = os.environ.get("LLAMAGEN")
SHAPES = {name: tuple(p.shape) for name, p in Model().named_parameters()}


class Codes:
    """What a task needs of a CodeSet."""

    def __init__(self, tokens_BN: torch.Tensor, labels_B: torch.Tensor) -> None:
        self.codes = tokens_BN[:, None].numpy().astype(np.uint16)
        self.labels = labels_B.numpy()
        self.meta: dict[str, Any] = {"classes": ["a", "b"]}

    def __len__(self) -> int:
        return len(self.labels)


def make_task(tokens: torch.Tensor, labels: torch.Tensor, seed: int = 0, **changes: Any) -> GPTTask:
    """All images in each step, nothing dropped, upstream's optimizer."""
    optim = OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0)
    config = tiny_config(batch_size=len(tokens), accumulation=1, optim=optim, **changes)
    torch.manual_seed(seed)
    model = GPT(config.model)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return GPTTask(model, config, Codes(tokens, labels), steps=10, world=ALONE)  # type: ignore[arg-type]


def quiet(config: Any) -> Any:
    """A model's config without anything random."""
    return dataclasses.replace(
        config,
        **{f"{name}_dropout_p": 0.0 for name in ("token", "attn", "resid", "ffn")},
        class_dropout_prob=0.0,
        drop_path_rate=0.0,
    )


def batch(count: int = 4, vocab: int = 64, tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab, (count, tokens), generator=generator), torch.arange(count) % 2


class TwoOfThem:
    """The main process of a world of two, whose other process has nothing to say: it writes for both."""

    rank, size, local_size, main, device = 0, 2, 2, True, torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def on_main(self, work: Any) -> Any:
        return work()


def store(
    kind: type[UpstreamStore], folder: Path, config: Any, *, world: Any = ALONE, source: Source | None = None
) -> UpstreamStore:
    folders = [folder / name for name in ("run", "local", "cloud")]
    for each in folders:
        each.mkdir(parents=True, exist_ok=True)
    places = Folders(folders[0], tuple(folders[1:]))
    return kind(places, Namespace(gpt_model="GPT-tiny", lr=1e-3, ema=True), config, world, Log(None), source)


def resumed(path: Path, task: GPTTask, folder: Path) -> int:
    """Bring a task to a checkpoint as the loop does; its step."""
    source = Source(path, task.config.model)
    files = store(PtStore, folder, task.config, source=source)
    found = files.newest()
    assert found is not None
    files.load(found, task)
    return found.step


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)


# --- names and numbers


def test_parameters_come_in_upstreams_order(golden: Path) -> None:
    theirs = list(torch.load(golden / "gpt_consolidated.pth", weights_only=True))
    model = load_gpt(golden / "gpt_ddp.pt", golden / "gpt_config.json")
    shapes = upstream_shapes({name: p.shape for name, p in model.named_parameters()})
    assert list(shapes) == theirs
    stand_in = [name.replace(".2.", ".1.") for name in SHAPES if f"layers.{LAYERS - 1}." in name]
    assert stand_in == [name for name in theirs if "layers.1." in name], "the stand-in of fsdp1_run.py has it, too"
    names = numbering(shapes)
    assert names[-1] == "norm.weight" and names[0] == "cls_embedding.embedding_table.weight"
    assert [name for name in names if "norm" in name] == names[-5:], "by dimensions and by name it is one order"


def test_its_optimizer_loads_ours_by_number(golden: Path) -> None:
    task = make_task(*batch())
    task.step(0)
    full = task.full_state()
    shapes = upstream_shapes({name: tensor.shape for name, tensor in full["model"].items()})
    weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    groups = [
        {"params": [p for p in weights.values() if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in weights.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, fused=True)
    own = full["optimizer"]["layers.1.feed_forward.w13.weight"]["exp_avg"].clone()
    theirs.load_state_dict(state_dict(unpacked_moments(full["optimizer"]), task.config.optim, shapes))
    assert [group["lr"] for group in theirs.param_groups] == [1e-3] * 2
    assert [group["weight_decay"] for group in theirs.param_groups] == [0.05, 0.0]
    halves = [theirs.state[weights[f"layers.1.feed_forward.{name}.weight"]]["exp_avg"] for name in ("w1", "w3")]
    assert torch.equal(torch.cat(halves), own) and own.abs().max() > 0
    assert all(theirs.state[p]["exp_avg"].shape == p.shape and theirs.state[p]["step"] == 1 for p in weights.values())


# --- whole checkpoints


@pytest.mark.parametrize("kind", [PtStore, FsdpStore])
def test_the_golden_steps_through_a_checkpoint(kind: type[UpstreamStore], golden: Path, tmp_path: Path) -> None:
    """Upstream's weights, two of its five AdamW steps, our checkpoint in its format, the other three: its weights."""
    expected = load_file(golden / "gpt_training.safetensors")
    inputs = load_file(golden / "gpt_expected.safetensors")
    model = quiet(load_gpt(golden / "gpt_ddp.pt", golden / "gpt_config.json").config)
    tokens, labels = inputs["tokens"], inputs["labels"]
    task = make_task(tokens, labels, model=dataclasses.replace(model, null_class=True), ema_decay=None)
    start = Source(golden / "gpt_ddp.pt", task.config.model)
    assert not start.resumes and start.steps == 0, "its optimizer is empty: a fresh start from the weights"
    start.into(task)
    losses = [float(task.step(step)["loss"]) for step in range(2)]
    files = store(kind, tmp_path, task.config, world=TwoOfThem() if kind is FsdpStore else ALONE)
    files.save(2, task, {}, keep_last=1)
    assert files.last is not None
    other = make_task(tokens, labels, seed=9, model=task.config.model, ema_decay=None)
    assert resumed(files.last, other, tmp_path) == 2
    losses += [float(other.step(step)["loss"]) for step in range(2, 5)]
    assert losses == pytest.approx(expected["loss"].tolist(), abs=1e-4)
    found = other.model.state_dict()
    final = from_upstream_state_dict({name[6:]: value for name, value in expected.items() if name.startswith("final.")})
    for name, value in final.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def test_a_pt_holds_what_upstreams_holds_and_a_restart_is_exact(tmp_path: Path) -> None:
    task = make_task(*batch())  # with dropout, class dropout and the average
    for step in range(3):
        task.step(step)
    files = store(PtStore, tmp_path, task.config)
    files.save(3, task, {"window": [[3, {"loss": 1.0}]]}, keep_last=1)
    assert files.last == tmp_path / "local" / "0000003.pt"
    assert files.last.read_bytes() == (tmp_path / "cloud" / "0000003.pt").read_bytes()
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(files.last, weights_only=True)
    assert set(content) == {"model", "optimizer", "steps", "args", "ema", "retinar"}
    assert content["steps"] == 3 and content["args"].lr == 1e-3
    assert equal(from_upstream_state_dict(content["model"]), task.model.state_dict())
    storages = {tensor.untyped_storage().data_ptr() for tensor in content["model"].values()}
    assert len(storages) == len(content["model"]), "no tensor is a view of another: other tools refuse those"
    tokens, labels = batch()
    with torch.no_grad():
        stored = load_gpt(files.last, task.config.model).eval()(tokens, labels)
        assert torch.equal(stored, task.model.eval()(tokens, labels))

    expected = [float(task.step(step)["loss"]) for step in range(3, 5)]
    other = make_task(*batch(), seed=9)
    assert resumed(files.last, other, tmp_path) == 3
    assert [float(other.step(step)["loss"]) for step in range(3, 5)] == expected
    assert equal(other.full_state(), task.full_state())


def test_an_fsdp_folder_is_read_at_any_number_of_processes(tmp_path: Path) -> None:
    task = make_task(*batch())
    for step in range(2):
        task.step(step)
    whole = task.full_state()
    for parallel, precision in (("fsdp", "bf16"), ("sdp", "fp32")):
        config = dataclasses.replace(task.config, parallel=parallel, precision=precision)  # type: ignore[arg-type]
        files = store(FsdpStore, tmp_path / parallel, config, world=TwoOfThem())
        files.save(2, task, {}, keep_last=1)
        assert files.last is not None and files.last.name == "0000002"
        names = sorted(path.name for path in files.last.iterdir())
        shards = [f"optimizer.{rank:05d}-of-00002.pth" for rank in (0, 1)]
        assert names == ["consolidated.pth", "ema.pth", *shards, "resume_step.txt", "retinar.json"]
        assert (files.last / "resume_step.txt").read_text() == "2\n"
        other = make_task(*batch(), seed=9)
        assert resumed(files.last, other, tmp_path) == 2
        assert equal(other.full_state(), whole)
        assert equal(read_upstream(files.last).weights, read_upstream(files.last / "consolidated.pth").weights)


@pytest.mark.parametrize("kind, world, files", [(PtStore, ALONE, 1), (FsdpStore, TwoOfThem(), 3)])
def test_nothing_half_written_is_left(
    kind: type[UpstreamStore], world: Any, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(*batch())
    kept = store(kind, tmp_path, task.config, world=world)
    kept.save(1, task, {}, keep_last=1)
    save, calls = torch.save, [0]

    def full(content: Any, path: Any) -> None:
        save(content, path)
        calls[0] += 1
        if calls[0] == files:
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"make room .* go on with .*0000001"):
        kept.save(2, task, {}, keep_last=1)
    left = [path.name for path in kept.folders.checkpoints[-1].iterdir()]
    assert [name.partition(".")[0] for name in left] == ["0000001"]


# --- where a training starts


def test_weights_alone_start_at_step_0(tmp_path: Path, golden: Path) -> None:
    task = make_task(*batch())
    weights = {name: tensor + 1 for name, tensor in make_task(*batch(), seed=3).model.state_dict().items()}
    for content in ({"model": to_upstream_state_dict(weights)}, to_upstream_state_dict(weights)):
        torch.save(content, tmp_path / "weights.pt")
        source = Source(tmp_path / "weights.pt", task.config.model)
        assert not source.resumes and not source.has_averages and source.steps == 0
        source.into(task)
        assert equal(task.model.state_dict(), weights)
        assert task.ema is not None and equal(task.ema.averages, weights), "averages start from the weights"
        assert all(not state["exp_avg"].any() for state in task.full_state()["optimizer"].values())


def test_a_fresh_start_may_bring_other_classes(tmp_path: Path) -> None:
    task = make_task(*batch())
    before = task.full_state()["model"]["cls_embedding.embedding_table.weight"]
    config = dataclasses.replace(task.config.model, num_classes=5)
    files = store(PtStore, tmp_path, task.config)
    other = make_task(*batch(), seed=3, model=config)
    torch.save({"model": read_weights(other)}, tmp_path / "weights.pt")
    source = Source(tmp_path / "weights.pt", task.config.model)
    assert source.fresh_classes
    source.into(task)
    found = task.full_state()["model"]
    assert torch.equal(found["cls_embedding.embedding_table.weight"], before)
    assert torch.equal(found["tok_embeddings.weight"], other.model.tok_embeddings.weight)
    files.save(1, other, {}, keep_last=1)
    assert files.last is not None
    with pytest.raises(InputError, match=r"cls_embedding.*\[3, 32\].*\[6, 32\].*--num-classes"):
        Source(files.last, task.config.model)


def read_weights(task: GPTTask) -> dict[str, torch.Tensor]:
    return to_upstream_state_dict(task.model.state_dict())


@pytest.mark.parametrize("name, steps", [("0000017.pt", 17), ("named.pt", 1)])
def test_the_step_of_a_file_that_does_not_say_it(name: str, steps: int, tmp_path: Path) -> None:
    task = make_task(*batch())
    task.step(0)
    files = store(PtStore, tmp_path, task.config)
    files.save(1, task, {}, keep_last=1)
    assert files.last is not None
    content = torch.load(files.last, weights_only=False)
    del content["steps"], content["retinar"]
    torch.save(content, tmp_path / name)
    source = Source(tmp_path / name, task.config.model)
    assert source.resumes and source.steps == steps and source.extra == {}


def test_other_models_and_damage_are_sentences(tmp_path: Path) -> None:
    task = make_task(*batch())
    task.step(0)
    files = store(FsdpStore, tmp_path, task.config, world=TwoOfThem())
    files.save(1, task, {}, keep_last=1)
    pt = store(PtStore, tmp_path, task.config)
    pt.save(1, task, {}, keep_last=1)
    assert files.last is not None and pt.last is not None
    deeper = dataclasses.replace(task.config.model, n_layer=3)
    with pytest.raises(InputError, match=r"layers\.2.*missing.*--gpt-model"):
        Source(pt.last, deeper)
    content = torch.load(pt.last, weights_only=False)
    content["optimizer"]["param_groups"][1]["params"].pop()
    torch.save(content, tmp_path / "fewer.pt")
    with pytest.raises(InputError, match=r"optimizer of 18 parameters .* found 17"):
        Source(tmp_path / "fewer.pt", task.config.model)
    torch.save({**content, "optimizer": {"state": {0: {"momentum": 1}}, "param_groups": [{"params": []}]}}, pt.last)
    with pytest.raises(InputError, match=r"optimizer of 18 parameters|AdamW"):
        Source(pt.last, task.config.model)
    first = files.last / "optimizer.00000-of-00002.pth"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        Source(files.last, task.config.model)
    first.unlink()
    with pytest.raises(InputError, match="2 of them, found 1"):
        Source(files.last, task.config.model)
    (files.last / "optimizer.00001-of-00002.pth").unlink()
    assert not Source(files.last, task.config.model).resumes
    (files.last / "resume_step.txt").write_text("many")
    with pytest.raises(InputError, match=r"resume_step\.txt"):
        Source(files.last, task.config.model)


# --- the shards


@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2), min_size=1, max_size=6),
    blocks=st.integers(0, 2),
    shards=st.integers(1, 5),
    align=st.sampled_from(sorted(ALIGNED.values())),
)
@settings(max_examples=60, deadline=None)
def test_pieces_cover_every_number_once(shapes: list[list[int]], blocks: int, shards: int, align: int) -> None:
    named = {f"layers.{i % (blocks + 1)}.{i}" if i < 2 * blocks else f"x{i}": shape for i, shape in enumerate(shapes)}
    held = pieces(named, shards, align)
    assert len(held) == shards
    for name, shape in named.items():
        numbers = [i for shard in held if name in shard for i in range(shard[name].start, shard[name].stop)]
        assert numbers == list(range(math.prod(shape))), "in the order of the shards"
    filled = [sum(piece.stop - piece.start for piece in shard.values()) for shard in held]
    padding = len(named) * align + (blocks + 2) * shards
    assert max(filled) <= -(-sum(map(math.prod, shapes)) // shards) + padding, "an even share"


@pytest.mark.parametrize("processes, shards", [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (2, 1)])
@pytest.mark.parametrize("align", sorted(ALIGNED.values()))
def test_files_of_any_cut_are_put_together(processes: int, shards: int, align: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(processes)
    whole = {
        name: {
            "step": torch.tensor(3.0),
            **{key: torch.randn(shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")},
        }
        for name, shape in SHAPES.items()
    }
    for name, content in split(whole, OptimConfig(), SHAPES, processes=processes, shards=shards, align=align):
        torch.save(content, tmp_path / name)
    files = Shards(tmp_path, SHAPES)
    assert files and all(equal(files[name], whole[name]) for name in SHAPES)
    others = {**SHAPES, "output.weight": (14, 9)}
    with pytest.raises(InputError, match="pieces of other sizes"):
        Shards(tmp_path, others)


def test_pytorchs_own_fsdp_writes_and_loads_these_files(tmp_path: Path) -> None:
    run_processes(2, "tests.train.fsdp1_run", str(tmp_path))
    for dtype in ALIGNED:
        files = Shards(tmp_path / str(dtype), SHAPES)
        whole = torch.load(tmp_path / str(dtype) / "whole.pt")
        for name, state in whole.items():
            assert files[name]["step"] == 3
            near = 1e-5 if dtype == torch.float32 else 5e-2
            for key in ("exp_avg", "exp_avg_sq"):
                assert (files[name][key] - state[key]).norm() <= near * state[key].norm(), (dtype, name, key)


# --- LlamaGen itself


@pytest.mark.skipif(CLONE is None, reason="no clone of LlamaGen: set LLAMAGEN to the folder of one")
@pytest.mark.parametrize("processes", [0, 2])
def test_llamagen_goes_on_with_ours_and_ours_with_its(processes: int, tmp_path: Path) -> None:
    """Its training scripts' optimizer, its transformer, its FSDP; nothing is dropped, so every number can agree."""
    tokens, labels = batch()
    task = make_task(tokens, labels, model=quiet(tiny_config().model), ema_decay=None)
    task.model.cls_embedding.dropout_p = 0.0
    for step in range(2):
        task.step(step)
    kind = FsdpStore if processes else PtStore
    files = store(kind, tmp_path, task.config, world=TwoOfThem() if processes else ALONE)
    files.save(2, task, {}, keep_last=1)
    logits = task.model.eval()(tokens, labels).detach()
    ours = [float(task.step(step)["loss"]) for step in range(2, 5)]
    theirs = clone(tmp_path, files.last, (tokens, labels), save=tmp_path / "theirs.pt", processes=processes)
    assert theirs["steps"] == 5
    assert (theirs["logits"] - logits).abs().max() <= 1e-5
    assert theirs["losses"] == pytest.approx(ours, abs=1e-5)
    same(task, theirs["weights"])

    back = make_task(tokens, labels, seed=9, model=task.config.model, ema_decay=None)
    assert resumed(tmp_path / "theirs.pt", back, tmp_path) == 5
    same(back, theirs["weights"], 0.0)
    on = clone(tmp_path, tmp_path / "theirs.pt", (tokens, labels), save=None, processes=processes)
    assert [float(back.step(step)["loss"]) for step in range(5, 8)] == pytest.approx(on["losses"], abs=1e-5)
    same(back, on["weights"])


def same(task: GPTTask, weights: dict[str, torch.Tensor], near: float = 1e-5) -> None:
    own = task.model.state_dict()
    theirs = from_upstream_state_dict(weights)
    assert own.keys() == theirs.keys()
    assert all((own[name] - theirs[name]).norm() <= near * theirs[name].norm() for name in own)


def clone(
    folder: Path, checkpoint: Path | None, data: tuple[torch.Tensor, torch.Tensor], *, save: Path | None, processes: int
) -> dict[str, Any]:
    """Three steps of LlamaGen's, on from a checkpoint."""
    config = tiny_config().model
    tokens, labels = (tensor[None].expand(3, *tensor.shape).clone() for tensor in data)
    torch.save({"tokens": tokens, "labels": labels}, folder / "tokens.pt")
    sizes = ("n_layer", "n_head", "dim", "multiple_of", "vocab_size", "num_classes", "block_size", "cls_token_num")
    job = {
        "model": {**{name: getattr(config, name) for name in sizes}, "model_type": "c2i"},
        "dropout": 0.0,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "tokens": str(folder / "tokens.pt"),
        "save": None if save is None else str(save),
    }
    (folder / "job.json").write_text(json.dumps(job))
    arguments = [str(CLONE), str(folder / "job.json"), str(folder / "out.pt")]
    if processes:
        run_processes(processes, "tests.train.clone_process", *arguments)
    else:
        script = ROOT / "tests" / "train" / "clone_process.py"
        done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")
