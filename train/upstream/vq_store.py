"""LlamaGen's checkpoints of tokenizer training: written, gone on with, and started from.

::

    RESULTS/{index:03d}-{vq model}/           log.txt, checkpoints/{step:07d}.pt
    CLOUD/{time}/{index:03d}-{vq model}/      a copy of checkpoints/

A file holds {model, optimizer, discriminator, optimizer_disc, steps, args, [ema]}, and ours under "retinar" what an
exact restart needs. Files are whole or absent; none is ever removed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retinar.engine.checkpoint import is_folder, load_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write
from retinar.engine.upstream import read_upstream, unpickle
from retinar.engine.weights import DISCRIMINATOR, read_file
from retinar.train.checkpoints import Checkpoint
from retinar.train.config import OptimConfig
from retinar.train.loop import Task
from retinar.train.optim import load_optimizer_state, optimizer_state
from retinar.train.patchgan import PatchGAN
from retinar.train.rng import restore_rng, rng_state, seed_new_process
from retinar.train.tokenizer import TokenizerTask
from retinar.train.upstream.checkpoints import Folders
from retinar.train.upstream.log import Log
from retinar.train.upstream.source import EXTRA
from retinar.train.world import World

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_WINDOW = "quantize.codebook_used"


class VqSource:
    """What ``--vq-ckpt`` names: a ``.pt``, or a folder of ours. Everything but the weights may be missing.

    ``resumes``: it goes on at ``steps``; otherwise (``finetune``, or no optimizer in it) training begins at step 0 with
    what there is. ``extra``: what ours keeps for an exact restart. InputError for what cannot be read.
    """

    def __init__(self, path: Path, *, finetune: bool) -> None:
        self.path = path
        self.content: Mapping[str, Any] = {}
        self.discriminator: dict[str, Tensor] = {}
        self.steps, self.extra = 0, {}
        if is_folder(path):
            if (path / DISCRIMINATOR).is_file():
                self.discriminator = {name: tensor.clone() for name, tensor in read_file(path / DISCRIMINATOR)}
        else:
            self.discriminator = read_upstream(path).discriminator
            self.content = unpickle(path)
        self.resumes = not finetune and isinstance(self.content.get("optimizer"), Mapping)
        if self.resumes:
            self.steps = self._steps()
            extra = self.content.get(EXTRA)
            self.extra = dict(extra) if isinstance(extra, Mapping) else {}

    def _steps(self) -> int:
        """As stated, else as the file's name has it, as upstream does."""
        stated = self.content.get("steps", int(self.path.stem) if self.path.stem.isdigit() else None)
        if not isinstance(stated, int) or stated < 0:
            raise InputError(
                f"Expected the step of {self.path} in it or in its name, found neither: add --finetune to begin at 0."
            )
        return stated

    def into(self, task: TokenizerTask) -> None:
        """Weights, averages (the weights where there are none), optimizers and discriminator, as far as there."""
        config = task.model.config
        task.model.load_state_dict(load_tokenizer(self.path, config).state_dict())
        if task.ema is not None:
            ema = isinstance(self.content.get("ema"), Mapping)
            averages = load_tokenizer(self.path, config, ema=ema).state_dict()
            task.ema.load({name: averages[name].to(task.device) for name in task.ema.averages})
        if "optimizer" in self.content:
            self._moments(task.model, task.optimizer, "optimizer")
        if task.discriminator is not None:
            if self.discriminator:
                try:
                    task.discriminator.load_state_dict(self.discriminator)
                except RuntimeError as error:
                    raise InputError(
                        f"Expected LlamaGen's PatchGAN in {self.path}, found another discriminator: give a checkpoint "
                        "without it, or --disc-weight 0."
                    ) from error
            if "optimizer_disc" in self.content:
                self._moments(task.discriminator, task.disc_optimizer, "optimizer_disc")

    def _moments(self, model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> None:
        names = [name for name, _ in model.named_parameters()]
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        try:
            stored = self.content[key]
            numbers = [number for group in stored["param_groups"] for number in group["params"]]
            known = dict(zip(numbers, names, strict=True))
            found = {
                known[number]: {moment: torch.as_tensor(values[moment]) for moment in MOMENTS}
                for number, values in stored["state"].items()
            }
            for name, moments in found.items():
                if any(moments[moment].shape != shapes[name] for moment in MOMENTS[1:]):
                    raise ValueError(f"moments of another shape for {name}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"Expected the state of Adam for this tokenizer under {key} in {self.path}, found something else "
                f"({error}): give another checkpoint."
            ) from None
        load_optimizer_state(model, optimizer, found)


class VqStore:
    """A store of :func:`retinar.train.loop.run`. All processes call every method alike."""

    again: str | None = None

    def __init__(
        self, folders: Folders, args: argparse.Namespace, world: World, log: Log, source: VqSource | None
    ) -> None:
        self.folders, self.args, self.world, self.log, self.source = folders, args, world, log, source
        self.path = folders.experiment
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.last: Path | None = None

    def newest(self) -> Checkpoint | None:
        """The checkpoint that the flags name; None where training begins at step 0."""
        if self.source is None or not self.source.resumes:
            return None
        return Checkpoint(self.source.path, self.source.steps, dict(self.source.extra.get("loop", {})))

    def load(self, checkpoint: Checkpoint, task: Task) -> None:
        """Bring the task to it, and the random states where ours saved them."""
        assert self.source is not None and isinstance(task, TokenizerTask)
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
        assert isinstance(task, TokenizerTask)
        extra = {"format": 1, "processes": self.world.size, "loop": dict(loop), "rng": self.world.gather(rng_state())}
        self.world.on_main(lambda: self._save(step, task, extra))

    def wait(self) -> None:
        """Nothing is ever under way."""

    def _save(self, step: int, task: TokenizerTask, extra: dict[str, Any]) -> None:
        content = {**file_content(task, step), "args": plain(self.args), EXTRA: extra}
        paths = [folder / f"{step:07d}.pt" for folder in self.folders.checkpoints]
        try:
            with atomic_write(paths[0]) as partial:
                torch.save(content, partial)
            for copy in paths[1:]:
                with atomic_write(copy) as partial:
                    shutil.copyfile(paths[0], partial)
        except (OSError, RuntimeError) as error:  # torch.save's own kind for a full disk is the latter
            go_on = f"with --vq-ckpt {self.last}" if self.last else "from the start"
            raise InputError(
                f"Expected to write the checkpoint of step {step}, found {error}: make room or fix the disk, then go "
                f"on {go_on}."
            ) from error
        for path in paths:
            where = " in cloud" if path.parent == self.folders.checkpoints[-1] else ""
            self.log.info(f"Saved checkpoint{where} to {path}")
        self.last = paths[0]


def file_content(task: TokenizerTask, step: int) -> dict[str, Any]:
    """What upstream's file holds of a task, but for its flags; the task's own tensors."""
    weights = task.model.state_dict()
    weights[_WINDOW] = weights[_WINDOW].float()
    # Upstream's file has a discriminator even where it takes no part.
    judge = task.discriminator if task.discriminator is not None else PatchGAN(task.config.disc_channels)
    moments = optimizer_state(judge, task.disc_optimizer) if task.discriminator is not None else {}
    content = {
        "model": weights,
        "optimizer": adam_state(task.model, optimizer_state(task.model, task.optimizer), task.config.optim),
        "discriminator": judge.state_dict(),
        "optimizer_disc": adam_state(judge, moments, task.config.disc_optim),
        "steps": step,
    }
    return content if task.ema is None else {**content, "ema": {**weights, **task.ema.averages}}


def adam_state(model: nn.Module, moments: Mapping[str, Mapping[str, Tensor]], config: OptimConfig) -> dict[str, Any]:
    """The ``state_dict()`` of upstream's Adam: parameters by number, in the module's order."""
    names = [name for name, _ in model.named_parameters()]
    # Ours is fused; upstream's goes on with the flags it finds here, and reads "step" on the host.
    adam = torch.optim.Adam([torch.zeros(1)], lr=config.lr, betas=config.betas, eps=config.eps)
    [group] = adam.state_dict()["param_groups"]
    state = {
        number: {**moments[name], "step": moments[name]["step"].detach().cpu()}
        for number, name in enumerate(names)
        if name in moments
    }
    return {"state": state, "param_groups": [{**group, "params": list(range(len(names)))}]}


def plain(args: argparse.Namespace) -> argparse.Namespace:
    """The flags as numbers and strings alone: nothing of ours is needed to read them."""
    kinds = {int: int, Path: str}
    values = {}
    for name, value in vars(args).items():
        kind = next((to for base, to in kinds.items() if isinstance(value, base) and not isinstance(value, bool)), None)
        values[name] = value if kind is None else kind(value)
    return argparse.Namespace(**values)
