"""Training the transformer on packed codes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retinar.engine.checkpoint import digest, load_gpt, load_tokenizer, save_gpt
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.progress import Progress, plain
from retinar.engine.tokenizer import VQTokenizer
from retinar.kernels import ops
from retinar.train import loop
from retinar.train.code_files import CodeSet
from retinar.train.config import GPTTrainConfig, to_dict
from retinar.train.device import autocast, compile_parts, pick_device
from retinar.train.optim import (
    EMA,
    build_adamw,
    clip_gradients,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from retinar.train.order import Order
from retinar.train.rng import seed_everything
from retinar.train.state import RunFolder


class GPTTask:
    """The transformer, its optimizer and its data: what :func:`retinar.train.loop.run` drives.

    ``model`` is trained in place where it lies; ``steps`` is the length that a cosine schedule spans.
    """

    name = "gpt"

    def __init__(
        self,
        model: GPT,
        config: GPTTrainConfig,
        codes: CodeSet,
        *,
        steps: int,
        valid: CodeSet | None = None,
        tokenizer: VQTokenizer | None = None,
    ) -> None:
        self.model, self.config, self.codes, self.valid, self.tokenizer = model, config, codes, valid, tokenizer
        self.steps, self.done = steps, 0
        self.device = next(model.parameters()).device
        self.backend = attention_backend(config, self.device)
        # The order of a parallel run is fixed here too: activation checkpointing, then compile, then sharding.
        model.activation_checkpointing = config.activation_checkpointing == "full"
        if config.compile:
            compile_parts(model.layers, self.device)
        self.optimizer = build_adamw(model, config.optim)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay is not None else None
        images, views, _ = codes.codes.shape
        self.order = Order(images, config.batch_size, seed=config.seed, views=views if config.views == "random" else 1)

    def step(self, step: int) -> loop.Values:
        """Forward, backward and AdamW over one batch, in ``accumulation`` parts."""
        lr = learning_rate(self.config.optim, step, self.steps)
        set_learning_rate(self.optimizer, lr)
        self.model.train()
        images, views = self.order.batch(step)
        loss = torch.zeros((), device=self.device)
        for part in np.split(np.arange(self.config.batch_size), self.config.accumulation):
            part_loss = self._loss(self.codes, images[part], views[part]) / self.config.accumulation
            part_loss.backward()
            loss += part_loss.detach()
        grad_norm = clip_gradients(self.model.parameters(), self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return {"loss": loss, "lr": lr, "grad_norm": grad_norm}

    def _loss(self, codes: CodeSet, images: Any, views: Any) -> Tensor:
        codes_BN = torch.from_numpy(codes.codes[images, views].astype(np.int64))
        labels_B = torch.from_numpy(np.asarray(codes.labels[images], dtype=np.int64))
        with autocast(self.device, self.config.precision):
            return self.model.loss(
                codes_BN.to(self.device, non_blocking=True),
                labels_B.to(self.device, non_blocking=True),
                attention_backend=self.backend,
            )

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Mean loss without dropout over at most ``eval_images`` validation images (evenly spaced, first view)."""
        if self.valid is None:
            return {}
        total = len(self.valid)
        chosen = np.unique(np.linspace(0, total - 1, min(total, self.config.eval_images)).astype(np.int64))
        self.model.eval()
        size = max(1, self.config.batch_size // self.config.accumulation)
        losses = [
            float(self._loss(self.valid, part, np.zeros_like(part))) * len(part)
            for part in (chosen[first : first + size] for first in range(0, len(chosen), size))
        ]
        return {"valid_loss": sum(losses) / len(chosen)}

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

    def export(self, folder: Path) -> None:
        """Write the averaged weights where there are any, else the weights, with the tokenizer inside."""
        model = self.model
        if self.ema is not None:
            model = copy.deepcopy(model)
            self.ema.copy_to(model)
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
    # What LlamaGen's own folders leave open is as the config has it.
    open_codes = partial(CodeSet, vocab_size=config.model.vocab_size, num_classes=config.model.num_classes)
    codes = open_codes(data)
    check_codes(config, codes)
    valid_codes = open_codes(valid) if valid is not None else None
    if valid_codes is not None:
        number_classes(valid_codes, codes.meta["classes"])
        check_codes(config, valid_codes)
    decoder = _tokenizer(tokenizer, codes) if tokenizer is not None else None
    device = pick_device(config.device)
    inputs = {"codes": _fingerprint(codes), "init": digest(init) if init is not None else None}
    with RunFolder.open(out, task="gpt", config=to_dict(config), inputs=inputs, resume=resume) as folder:
        seed_everything(config.seed)
        with device:
            model = GPT(config.model)
        if init is not None:
            start_from(model, load_gpt(init))
        steps = config.total_steps(len(codes))
        task = GPTTask(model, config, codes, steps=steps, valid=valid_codes, tokenizer=decoder)
        return loop.run_as(config, task, folder, steps=steps, max_minutes=max_minutes, progress=progress)


def codes_fields(codes: CodeSet) -> dict[str, int]:
    """What codes say about the transformer: vocabulary, grid, number of classes."""
    return {
        "vocab_size": codes.vocab_size,
        "grid": int(codes.meta["grid"]),
        "num_classes": len(codes.meta["classes"]),
    }


def fit_to_codes(config: GPTTrainConfig, codes: CodeSet) -> GPTTrainConfig:
    """``config`` with the codes' vocabulary, grid and classes where the recipe leaves them to the codes."""
    if not config.fit_to_codes:
        return config
    fields: dict[str, Any] = codes_fields(codes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def check_codes(config: GPTTrainConfig, codes: CodeSet) -> None:
    """InputError, with the ``--set`` that mends it, when codes and model differ in vocabulary, grid or classes."""
    wanted = {name: getattr(config.model, name) for name in codes_fields(codes)}
    found = {name: value for name, value in codes_fields(codes).items() if value != wanted[name]}
    if found:
        differences = ", ".join(f"{name} {value} instead of {wanted[name]}" for name, value in found.items())
        mend = " ".join(f"model.{name}={value}" for name, value in found.items())
        raise InputError(f"Expected codes for recipe {config.recipe}, found {differences}: add --set {mend}.")


def number_classes(codes: CodeSet, classes: list[str]) -> None:
    """Number the labels by ``classes``, those of the training codes: a split may lack one. InputError for others."""
    own = codes.meta["classes"]
    if others := [name for name in own if name not in classes]:
        raise InputError(
            f"Expected validation codes of the classes {', '.join(classes)}, found {', '.join(others)} in "
            f"{codes.path}: give those of the same data."
        )
    codes.labels = np.array([classes.index(name) for name in own], np.int64)[codes.labels]
    codes.meta = {**codes.meta, "classes": classes}


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


def _tokenizer(path: Path | str, codes: CodeSet) -> VQTokenizer:
    found, wanted = digest(path), codes.meta.get("tokenizer_digest")
    if wanted is not None and found != wanted:
        raise InputError(
            f"Expected the tokenizer that made the codes (digest {wanted[:12]}), found {found[:12]} at {path}."
        )
    tokenizer = load_tokenizer(path)
    if tokenizer.config.codebook_size != codes.vocab_size:
        raise InputError(
            f"Expected a tokenizer of {codes.vocab_size} codes for {codes.path}, found one of "
            f"{tokenizer.config.codebook_size} at {path}: give the one that made them."
        )
    return tokenizer


def _fingerprint(codes: CodeSet) -> str:
    """SHA-256 over codes and labels, read in blocks: the file may be larger than memory."""
    found = hashlib.sha256()
    for first in range(0, len(codes), 4096):
        found.update(np.ascontiguousarray(codes.codes[first : first + 4096]).tobytes())
    found.update(np.ascontiguousarray(codes.labels).tobytes())
    return found.hexdigest()


def default_codes(path: Path | str) -> tuple[Path, Path | None]:
    """(training codes, validation codes or None) for a code folder, or for one that holds train/ and valid/."""
    path = Path(path)
    if (path / "train").is_dir() and not (path / "codes.npy").exists():
        valid = path / "valid"
        return path / "train", valid if valid.is_dir() else None
    return path, None
