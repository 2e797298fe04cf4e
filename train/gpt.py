"""Training the transformer on packed codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retinar.engine.checkpoint import digest, load_gpt, save_gpt
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.progress import Progress, plain
from retinar.engine.tokenizer import VQTokenizer
from retinar.kernels import ops
from retinar.train import loop
from retinar.train.code_files import CodeSet
from retinar.train.code_fit import check_codes, codes_digest, number_classes, tokenizer_of
from retinar.train.config import GPTTrainConfig, defaults, to_dict
from retinar.train.device import compile_parts, memory_advice
from retinar.train.flops import gpt_step_flops
from retinar.train.guard import Guard, batch_names
from retinar.train.meters import Meters, matmul_flops_per_s
from retinar.train.metrics_log import check_wandb
from retinar.train.optim import (
    EMA,
    build_adamw,
    clip_gradients,
    full_optimizer_state,
    learning_rate,
    load_full_optimizer_state,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from retinar.train.order import Order, own_rows
from retinar.train.parallel import gathered, spread, wrap
from retinar.train.rng import seed_everything, seed_process
from retinar.train.state import RunFolder
from retinar.train.world import World, joined


class GPTTask:
    """The transformer, its optimizer and its data: what :func:`retinar.train.loop.run` drives.

    ``model`` is trained in place where it lies; ``steps`` is the length that a cosine schedule spans.
    """

    name = "gpt"
    criterion = "valid_loss"

    def __init__(
        self,
        model: GPT,
        config: GPTTrainConfig,
        codes: CodeSet,
        *,
        steps: int,
        valid: CodeSet | None = None,
        tokenizer: VQTokenizer | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.config, self.codes, self.valid, self.tokenizer = model, config, codes, valid, tokenizer
        self.steps, self.done = steps, 0
        self.device = next(model.parameters()).device
        self.world = world or World(self.device)
        self.rows = own_rows(config, self.world)
        self.backend = attention_backend(config, self.device)
        # In this order: activation checkpointing, compile, sharding.
        model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            compile_parts(model.layers, self.device)
        self.parallel = wrap(model, list(model.layers), config, self.world)
        self.guard = Guard(config.guard, config.spike, tells=self.world.main)
        self._waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self.optimizer = build_adamw(model, config.optim)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay is not None else None
        images, views, _ = codes.codes.shape
        self.order = Order(images, config.batch_size, seed=config.seed, views=views if config.views == "random" else 1)

    def step(self, step: int) -> loop.Values:
        """Forward, backward and AdamW over this process's rows of one batch, in ``accumulation`` parts."""
        lr = learning_rate(self.config.optim, step, self.steps)
        set_learning_rate(self.optimizer, lr)
        self.model.train()
        images, views = self.order.batch(step)
        loss = torch.zeros((), device=self.device)
        for part in self.rows:
            with self._waiting():
                batch = self._batch(self.codes, images[part], views[part])
            with self.parallel.accumulate(last=part is self.rows[-1]):
                part_loss = self._loss(*batch) / len(self.rows)
                part_loss.backward()
            loss += part_loss.detach()
        grad_norm = clip_gradients(self.model.parameters(), self.config.optim.grad_clip)
        applied = self.guard.allows(step, grad_norm, self.describe)
        if applied:
            self.optimizer.step()
        self.parallel.clear_gradients(self.optimizer, len(self.rows))
        if applied and self.ema is not None:
            self.ema.update(self.model)
        found: dict[str, float | Tensor] = {"loss": loss, "grad_norm": grad_norm} if applied else {}
        return {**found, "lr": lr, **({"skipped": float(not applied)} if self.guard.skips else {})}

    def _batch(self, codes: CodeSet, images: Any, views: Any) -> tuple[Tensor, Tensor]:
        """(codes [B, N] int64, labels [B] int64) on the device."""
        codes_BN = torch.from_numpy(codes.codes[images, views].astype(np.int64))
        labels_B = torch.from_numpy(np.asarray(codes.labels[images], dtype=np.int64))
        return codes_BN.to(self.device, non_blocking=True), labels_B.to(self.device, non_blocking=True)

    def _loss(self, codes_BN: Tensor, labels_B: Tensor) -> Tensor:
        with self.parallel.autocast():
            return self.parallel.forward(codes_BN, labels_B, attention_backend=self.backend, return_loss=True)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Mean loss without dropout over at most ``eval_images`` validation images (evenly spaced, first view)."""
        if self.valid is None:
            return {}
        total, world = len(self.valid), self.world
        chosen = np.unique(np.linspace(0, total - 1, min(total, self.config.eval_images)).astype(np.int64))
        self.model.eval()
        size = max(1, self.config.batch_size // (self.config.accumulation * world.size))
        found = torch.zeros(2, dtype=torch.float64)  # sum of losses, images
        for first in range(0, len(chosen), size * world.size):
            start = first + world.rank * size
            part = chosen[start : start + size]
            # Sharded weights are gathered by all processes or by none: one without images of its own goes along.
            shown = part if len(part) else chosen[:1]
            loss = float(self._loss(*self._batch(self.valid, shown, np.zeros_like(shown))))
            found += torch.tensor([loss * len(part), len(part)], dtype=torch.float64)
        self.parallel.reshard()
        losses, images = world.sum(found).tolist()
        return {"valid_loss": losses / images}

    def describe(self, step: int) -> str:
        """The images of a step in words."""
        return batch_names(self.order.batch(step)[0], self.codes.meta.get("names"))

    def meters(self) -> Meters | None:
        """Begin to meter what follows, where the config asks for it. All processes call it."""
        if not self.config.meters:
            return None
        rate = matmul_flops_per_s(self.device, self.config.precision)
        total = float(self.world.sum(torch.tensor(rate, dtype=torch.float64)))
        tokens = self.config.batch_size * self.config.model.block_size
        flops = sum(gpt_step_flops(self.config.model, self.config.batch_size).values())
        meters = Meters(tokens, flops, self.device, total, done=self.done)
        self._waiting = meters.data
        return meters

    def notes(self) -> dict[str, Any]:
        """JSON values that later steps depend on."""
        return {"guard": self.guard.state_dict()}

    def take_notes(self, notes: dict[str, Any]) -> None:
        """Take up what :meth:`notes` gave."""
        self.guard.load_state_dict(notes.get("guard", {}))

    def state_dict(self) -> dict[str, Any]:
        """Weights (without the rotary table, which is no state), AdamW's tensors by parameter name, and the EMA."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }
        if self.ema is not None:
            state["ema"] = dict(self.ema.averages)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state in; tensors that already are ours stay as they are."""
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load(state["ema"])

    def full_state(self) -> dict[str, Any]:
        """:meth:`state_dict` with whole tensors on the CPU in the main process, {} elsewhere. All processes call it."""
        model = gathered(self.model.state_dict(), self.world)
        optimizer = full_optimizer_state(self.model, self.optimizer, self.world)
        ema = gathered(self.ema.averages, self.world) if self.ema is not None else None
        if not self.world.main:
            return {}
        return {"model": model, "optimizer": optimizer, **({"ema": ema} if ema is not None else {})}

    def load_full_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`full_state` gave, the same in every process; what is absent stays as it is."""
        spread(state.get("model", {}), self.model.state_dict())
        load_full_optimizer_state(self.model, self.optimizer, state.get("optimizer", {}))
        if self.ema is not None:
            spread(state.get("ema", {}), self.ema.averages)

    def export(self, folder: Path) -> None:
        """Write the averaged weights where there are any, else the weights, with the tokenizer inside."""
        weights = gathered(self.model.state_dict(), self.world)
        if self.ema is not None:
            weights |= gathered(self.ema.averages, self.world)
        self.world.on_main(lambda: self._write(weights, folder))

    def _write(self, weights: dict[str, Tensor], folder: Path) -> None:
        with torch.device("meta"):
            model = GPT(self.model.config)
        model.load_state_dict(weights, assign=True)
        training = {"recipe": self.config.recipe, "steps": self.done, "ema": self.ema is not None}
        classes = tuple(self.codes.meta["classes"])
        save_gpt(folder, model, classes=classes, tokenizer=self.tokenizer, card=None, extra={"training": training})


def train_gpt(
    config: GPTTrainConfig,
    data: Path | str,
    out: Path | str,
    *,
    valid: Path | str | None = None,
    tokenizer: Path | str | None = None,
    init: Path | str | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    progress: Progress = plain,
) -> loop.RunResult:
    """A whole run: codes in ``data``, everything it produces in ``out``, the model in ``out/model``.

    ``config`` must agree with the codes (see :func:`fit_to_codes`, :func:`check_codes`). ``tokenizer`` goes into the
    exported folder, so that it can sample by itself; ``init`` is a checkpoint to start from. InputError as the parts
    raise it.
    """
    check_wandb(config.wandb)
    # What LlamaGen's own folders leave open is as the config has it.
    open_codes = partial(CodeSet, vocab_size=config.model.vocab_size, num_classes=config.model.num_classes)
    codes = open_codes(data)
    check_codes(config, codes)
    valid_codes = open_codes(valid) if valid is not None else None
    if valid_codes is not None:
        number_classes(valid_codes, codes.meta["classes"])
        check_codes(config, valid_codes)
    decoder = tokenizer_of(tokenizer, codes) if tokenizer is not None else None
    inputs = {"codes": codes_digest(codes), "init": digest(init) if init is not None else None}
    with (
        joined(config.device) as world,
        memory_advice(config, world.size),
        RunFolder.open(
            out,
            task="gpt",
            config=to_dict(config),
            inputs=inputs,
            resume=resume,
            defaults=defaults(config),
            world=world,
        ) as folder,
    ):
        seed_everything(config.seed)
        with world.device:
            model = GPT(config.model)
        if init is not None:
            start_from(model, load_gpt(init))
        seed_process(config.seed, world.rank)
        steps = config.total_steps(len(codes))
        task = GPTTask(model, config, codes, steps=steps, valid=valid_codes, tokenizer=decoder, world=world)
        return loop.run_as(config, task, folder, steps=steps, max_minutes=max_minutes, progress=progress)


def start_from(model: GPT, source: GPT) -> None:
    """Copy ``source``'s weights; a table of other classes stays as initialised, any other difference is an error."""
    weights = source.state_dict()
    own = model.state_dict()
    if own.keys() != weights.keys():
        raise InputError(f"Expected {model.config.n_layer} layers to start from, found {source.config.n_layer}.")
    table = "cls_embedding.embedding_table.weight"
    for name, tensor in weights.items():
        if tensor.shape == own[name].shape:
            own[name].copy_(tensor)
        elif name == table:
            print(f"starting with new class embeddings ({len(own[name])} rows, not {len(tensor)}).", file=sys.stderr)
        else:
            raise InputError(
                f"Expected {name} of shape {list(own[name].shape)} to start from, found {list(tensor.shape)}: "
                "--set model.* as the checkpoint has it."
            )


def attention_backend(config: GPTTrainConfig, device: torch.device) -> str | None:
    """``backend`` of ``ops.rope_attention``: as configured; for "auto" our kernel where there is one, else torch's
    fused attention where nothing is dropped, else what the dispatcher takes (None)."""
    chosen, dropout_p = config.attention_backend, config.model.attn_dropout_p
    known = {**ops.backends("rope_attention"), "sdpa": None}
    if chosen == "auto":
        ours = ops.preferred("rope_attention", device.type) != "reference"
        return None if ours or dropout_p > 0 else "sdpa"
    if chosen not in known:
        raise InputError(
            f"Expected attention_backend auto, {' or '.join(known)}, found {chosen!r}: choose one of them."
        )
    if known[chosen] is not None:
        raise InputError(f"Expected an attention_backend that runs here, found {chosen}: {known[chosen]}.")
    if chosen in ("sdpa", "flash") and dropout_p > 0:
        raise InputError(
            f"Expected model.attn_dropout_p 0 with attention_backend {chosen}, found {dropout_p}: set it to 0, or "
            "another attention_backend."
        )
    return chosen
