"""Where a run keeps what it has, as LlamaGen's training does: its folders, its files, its names.

::

    RESULTS/{index:03d}-{model}/          train_c2i: log.txt, checkpoints/{step:07d}.pt
    CLOUD/{time}/{index:03d}-{model}/     a copy of checkpoints/
    RESULTS/{time}-{model}/               train_c2i_fsdp: log.txt
    CLOUD/{time}-{model}/{step:07d}/      consolidated.pth, optimizer.RRRRR-of-WWWWW.pth, resume_step.txt

Ours adds metrics.jsonl beside log.txt; to a ``.pt`` the key "retinar", to a folder retinar.json and, with ``--ema``,
ema.pth: what an exact restart needs. Files and folders are whole or absent. Nothing is ever removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write, write_json, write_text
from retinar.engine.upstream import CONSOLIDATED
from retinar.train.checkpoints import Checkpoint
from retinar.train.config import GPTTrainConfig
from retinar.train.gpt import GPTTask
from retinar.train.loop import Task
from retinar.train.rng import restore_rng, rng_state, seed_new_process
from retinar.train.upstream.adamw import Shapes, state_dict, unpacked, unpacked_moments, upstream_shapes
from retinar.train.upstream.fsdp_files import ALIGNED, split
from retinar.train.upstream.log import Log
from retinar.train.upstream.source import EMA, EXTRA, OURS, STEP, Source
from retinar.train.world import World


@dataclass(frozen=True)
class Folders:
    """``experiment``: this run's in --results-dir; ``checkpoints``: where they go, --cloud-save-path last."""

    experiment: Path
    checkpoints: tuple[Path, ...]


def ddp_folders(args: argparse.Namespace) -> Folders:
    """Made anew, as ``train_c2i.py`` names them; the index is the number of runs that are there."""
    results = Path(args.results_dir)
    results.mkdir(parents=True, exist_ok=True)
    index = len([entry for entry in results.iterdir() if entry.name[0] != "."])
    while True:
        name = f"{index:03d}-{args.gpt_model}"
        try:
            (results / name).mkdir()
            break
        except FileExistsError:
            index += 1
    cloud = Path(args.cloud_save_path) / time.strftime("%Y-%m-%d-%H-%M-%S") / name / "checkpoints"
    local = results / name / "checkpoints"
    for folder in (local, cloud):
        folder.mkdir(parents=True, exist_ok=True)
    return Folders(results / name, (cloud,) if args.no_local_save else (local, cloud))


def fsdp_folders(args: argparse.Namespace) -> Folders:
    """Made anew, as ``train_c2i_fsdp.py`` names them."""
    while True:
        name = f"{time.strftime('%Y%m%d%H%M%S')}-{args.gpt_model}"
        try:
            (Path(args.results_dir) / name).mkdir(parents=True)
            break
        except FileExistsError:  # another run began in this second
            time.sleep(1)
    cloud = Path(args.cloud_save_path) / name
    cloud.mkdir(parents=True, exist_ok=True)
    return Folders(Path(args.results_dir) / name, (cloud,))


class UpstreamStore(ABC):
    """A store of :func:`retinar.train.loop.run` in upstream's format. All processes call every method alike.

    ``source``: the checkpoint to go on from. Saving waits until the files are whole.
    """

    again: str | None = None

    def __init__(
        self,
        folders: Folders,
        args: argparse.Namespace,
        config: GPTTrainConfig,
        world: World,
        log: Log,
        source: Source | None,
    ) -> None:
        self.folders, self.args, self.config, self.world, self.log, self.source = (
            folders,
            args,
            config,
            world,
            log,
            source,
        )
        self.path = folders.experiment
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.last: Path | None = None
        """The newest checkpoint of this session."""

    def newest(self) -> Checkpoint | None:
        """The checkpoint that the flags name; None without one, or where it has weights alone."""
        if self.source is None or not self.source.resumes:
            return None
        return Checkpoint(self.source.path, self.source.steps, dict(self.source.extra.get("loop", {})))

    def load(self, checkpoint: Checkpoint, task: Task) -> None:
        """Bring the task to it, and the random states where ours saved them; a process that the saved run did not
        have begins random numbers of its own."""
        assert self.source is not None and isinstance(task, GPTTask)
        self.source.into(task)
        states = self.source.extra.get("rng", [])
        if self.world.rank < len(states):
            restore_rng(states[self.world.rank])
        else:
            seed_new_process(self.world.rank, checkpoint.step)

    def save(
        self,
        step: int,
        task: Task,
        loop: Mapping[str, Any],
        *,
        keep_last: int,
        value: float | None = None,
        keep_best: bool = False,
    ) -> None:
        """Write the checkpoint of ``step``; the main process does. InputError when the file system refuses."""
        assert isinstance(task, GPTTask)
        full = task.full_state()
        extra = {"format": 1, "processes": self.world.size, "loop": dict(loop), "rng": self.world.gather(rng_state())}
        self.world.on_main(lambda: self._save(step, full, extra))

    def wait(self) -> None:  # noqa: B027 (nothing is ever under way)
        """Until it is written: save has done that."""

    def _save(self, step: int, full: dict[str, Any], extra: dict[str, Any]) -> None:
        shapes = upstream_shapes({name: tensor.shape for name, tensor in full["model"].items()})
        try:
            self.write(step, full, extra, shapes)
        except (OSError, RuntimeError) as error:  # torch.save's own kind for a full disk is the latter
            go_on = f"with {self.last}" if self.last else "from the start"
            raise InputError(
                f"Expected to write the checkpoint of step {step}, found {error}: make room or fix the disk, then go "
                f"on {go_on}."
            ) from error

    @abstractmethod
    def write(self, step: int, full: dict[str, Any], extra: dict[str, Any], shapes: Shapes) -> None:
        """The files of a checkpoint. ``full``, as ``GPTTask.full_state`` has it, may be taken apart."""


class PtStore(UpstreamStore):
    """``train_c2i``: one ``.pt`` a checkpoint, in the run's folder and in the cloud's."""

    def write(self, step: int, full: dict[str, Any], extra: dict[str, Any], shapes: Shapes) -> None:
        content: dict[str, Any] = {
            "model": unpacked(full["model"]),
            "optimizer": state_dict(unpacked_moments(full["optimizer"]), self.config.optim, shapes),
            "steps": step,
            "args": self.args,
            **({"ema": unpacked(full["ema"])} if "ema" in full else {}),
            EXTRA: extra,
        }
        paths = [folder / f"{step:07d}.pt" for folder in self.folders.checkpoints]
        _whole(paths[0], lambda partial: torch.save(content, partial))
        for copy in paths[1:]:
            _whole(copy, lambda partial: shutil.copyfile(paths[0], partial))
        for path in paths:
            where = " in cloud" if path.parent == self.folders.checkpoints[-1] else ""
            self.log.info(f"Saved checkpoint{where} to {path}")
        self.last = paths[0]


class FsdpStore(UpstreamStore):
    """``train_c2i_fsdp``: a folder a checkpoint, which upstream's can resume with as many processes."""

    def write(self, step: int, full: dict[str, Any], extra: dict[str, Any], shapes: Shapes) -> None:
        final = self.folders.checkpoints[-1] / f"{step:07d}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            torch.save(unpacked(full.pop("model")), partial / CONSOLIDATED)
            if "ema" in full:
                torch.save(unpacked(full.pop("ema")), partial / EMA)
            align = ALIGNED[torch.bfloat16 if self.config.precision == "bf16" else torch.float32]
            moments = unpacked_moments(full.pop("optimizer"))
            processes, shards = self.world.size, shard_count(self.config, self.world)
            for name, content in split(
                moments, self.config.optim, shapes, processes=processes, shards=shards, align=align
            ):
                torch.save(content, partial / name)
            write_text(partial / STEP, f"{step}\n")
            write_json(partial / OURS, extra)
            for entry in (*partial.iterdir(), partial):
                _sync(entry)
            os.rename(partial, final)
            _sync(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for what in ("consolidated", "optimizer", "training step"):
            self.log.info(f"Saved {what} to {final}")
        self.last = final


def shard_count(config: GPTTrainConfig, world: World) -> int:
    """Into how many pieces each tensor is cut: under hsdp by the processes of one machine, else by all."""
    if config.parallel != "hsdp":
        return world.size
    replicas = config.replicas if config.replicas is not None else max(1, world.size // world.local_size)
    return world.size // replicas


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    with atomic_write(path) as partial:
        write(partial)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
