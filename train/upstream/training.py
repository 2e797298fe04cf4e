"""What ``train_c2i`` and ``train_c2i_fsdp`` have in common: a run from their flags to their files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.progress import silent
from retinar.train import loop
from retinar.train.code_files import CodeSet
from retinar.train.config import GPTTrainConfig
from retinar.train.gpt import GPTTask
from retinar.train.metrics_log import WITHOUT, check_wandb
from retinar.train.rng import seed_everything, seed_process
from retinar.train.upstream.checkpoints import Folders, UpstreamStore
from retinar.train.upstream.code_folder import open_codes
from retinar.train.upstream.flags import refuse_srun
from retinar.train.upstream.gpt_flags import check_flags, config_of, total_steps, uses_tf32
from retinar.train.upstream.log import Log
from retinar.train.upstream.source import Source
from retinar.train.world import World, joined


class UpstreamTask(GPTTask):
    """A GPTTask that logs upstream's lines and exports nothing: upstream leaves checkpoints alone."""

    log: Log
    epoch = -1

    def begin(self, log: Log) -> None:
        """Report to ``log`` from here on."""
        self.log = log
        self._losses: list[Tensor] = []
        self._since = time.monotonic()

    def step(self, step: int) -> loop.Values:
        """A step, and the lines that are due."""
        epoch = step * self.config.batch_size // len(self.codes)
        if epoch > self.epoch:
            self.epoch = epoch
            self.log.info(f"Beginning epoch {epoch}...")
        values = super().step(step)
        if "loss" in values:
            self._losses.append(torch.as_tensor(values["loss"]))
        if (step + 1) % self.config.log_every == 0 and self._losses:
            loss = float(self.world.mean(torch.stack(self._losses).double().mean().cpu()))
            now = time.monotonic()
            speed = len(self._losses) / (now - self._since)
            self.log.info(f"(step={step + 1:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {speed:.2f}")
            self._losses, self._since = [], now
        return values

    def export(self, folder: Path) -> None:
        """Nothing: `retinar convert CHECKPOINT FOLDER` makes our folder of any of them."""


def train(
    args: argparse.Namespace,
    folders: Callable[[argparse.Namespace], Folders],
    store: Callable[..., UpstreamStore],
    resume: str | None,
) -> int:
    """The whole run; 0, or 130 where Ctrl-C ended it. ``resume``: the checkpoint that the flags name."""
    refuse_srun()
    check_flags(args)
    config = config_of(args)
    with joined(config.device) as world, _in_our_flags(args):
        world.on_main(lambda: check_wandb(config.wandb) and None)
        if world.device.type == "cuda" and uses_tf32(args):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        source = world.together(lambda: _source(resume, config))
        codes = open_codes(args, f"{args.dataset.removesuffix('_code')}{args.image_size}", world)
        _check_codes(args, config, codes)
        places: Folders = world.on_main(lambda: folders(args))
        log = Log(places.experiment if world.main else None)
        log.info(f"Experiment directory created at {places.experiment}")
        log.info(f"Experiment directory created in cloud at {places.checkpoints[-1]}")
        log.info(f"{args}")
        log.info(f"Starting rank={world.rank}, seed={config.seed}, world_size={world.size}.")
        task = _task(args, config, codes, world, log)
        files = store(places, args, config, world, log, source)
        if source is not None:
            _announce(source, files, task, log)
        log.info(f"Training for {args.epochs} epochs...")
        task.begin(log)
        result = loop.run_as(config, task, files, steps=task.steps, max_minutes=None, progress=silent)
        if result.reason == "finished":
            log.info("Done!")
        else:
            flag = "--gpt-resume" if hasattr(args, "gpt_resume") else "--gpt-ckpt"
            log.info(f"Stopped at step {result.step} of {result.steps}; {flag} {files.last} goes on.")
        return 130 if result.reason == "interrupted" else 0


@contextmanager
def _in_our_flags(args: argparse.Namespace) -> Iterator[None]:
    """What W&B refuses, and what a GPU has no room for, is told with the flags that help here."""
    try:
        yield
    except InputError as error:
        error.args = (str(error).replace(WITHOUT, "or add --no-wandb"),)
        raise
    except torch.OutOfMemoryError as error:
        parts, sharded = 2 * args.gradient_accumulation_steps, getattr(args, "data_parallel", None) in ("fsdp", "hsdp")
        others = "more GPUs" if sharded else "train_c2i_fsdp on several GPUs"
        raise InputError(
            f"Expected a step of {args.gpt_model} to fit into the GPU's memory, found it full: set "
            f"--gradient-accumulation-steps {parts}, take {others}, or `retinar train gpt` with "
            "activation_checkpointing=full (--plan shows what fits)."
        ) from error


def _source(resume: str | None, config: GPTTrainConfig) -> Source | None:
    return Source(Path(resume), config.model) if resume else None


def _task(args: argparse.Namespace, config: GPTTrainConfig, codes: CodeSet, world: World, log: Log) -> UpstreamTask:
    images, views, _ = codes.codes.shape
    mirrored = "with" if views > 1 else "without"
    log.info(
        f"Dataset contains {images:,} images ({args.code_path}) {mirrored} flip augmentation and {max(1, views // 2)} "
        "crop augmentation"
    )
    seed_everything(config.seed)
    with world.device:
        model = GPT(config.model)
    seed_process(config.seed, world.rank)
    log.info(f"GPT Parameters: {config.model.parameter_count:,}")
    if config.ema_decay is not None:
        log.info(f"EMA Parameters: {config.model.parameter_count:,}")
    return UpstreamTask(model, config, codes, steps=total_steps(args, images), world=world)


def _announce(source: Source, files: UpstreamStore, task: UpstreamTask, log: Log) -> None:
    """Say what the checkpoint is for; weights without an optimizer are taken here, the loop takes the others."""
    if source.resumes:
        log.info(f"Resume training from checkpoint: {source.path}")
        epoch = source.steps * task.config.batch_size // len(task.codes)
        log.info(f"Initial state: steps={source.steps}, epochs={epoch}")
        return
    source.into(task)
    log.info(f"Starting from the weights in {source.path} (no optimizer in it): steps=0, epochs=0")
    if source.fresh_classes:
        log.info(f"It has other classes: the table of {task.config.model.num_classes} classes starts anew.")


def _check_codes(args: argparse.Namespace, config: GPTTrainConfig, codes: CodeSet) -> None:
    """InputError unless the codes' grid is the model's, and codes and labels lie within its tables."""
    grid, wanted, where = int(codes.meta["grid"]), config.model.grid, args.code_path
    highest, classes = codes.vocab_size - 1, len(codes.meta["classes"])
    if grid != wanted:
        raise InputError(
            f"Expected codes of a {wanted}x{wanted} grid (--image-size {args.image_size} / --downsample-size "
            f"{args.downsample_size}), found {grid}x{grid} in {where}: set the two as they were extracted."
        )
    if highest >= args.vocab_size:
        raise InputError(
            f"Expected codes below --vocab-size {args.vocab_size}, found {highest} in {where}: set it to the size of "
            "their tokenizer's codebook."
        )
    if classes > args.num_classes:
        raise InputError(
            f"Expected labels below --num-classes {args.num_classes}, found {classes - 1} in {where}: set it to the "
            "number of classes."
        )
