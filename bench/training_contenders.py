"""What competes in `training_speed`, and at which size: our step, LlamaGen's loop, a loop like it in plain torch."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from retinar.bench.baselines import upstream_training
from retinar.bench.baselines.plain_gpt import PlainGPT
from retinar.bench.baselines.upstream import Upstream, model_arguments
from retinar.bench.deadline import Deadline
from retinar.bench.training import make_task
from retinar.engine.config import GPTConfig, gpt_config
from retinar.train.config import GPTTrainConfig, OptimConfig, Precision

TINY = {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 32, "vocab_size": 64, "num_classes": 2}


@dataclass(frozen=True)
class SpeedSize:
    """``turns`` of ``steps`` each, after ``uncounted`` ones at the start of a turn (they fetch memory again)."""

    model: str
    grid: int
    images: int
    turns: int
    steps: int
    uncounted: int = 0
    precision: Precision = "bf16"
    compiled: tuple[bool, ...] = (False, True)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> GPTConfig:
        """With upstream's dropouts: 0.1, none on attention's probabilities."""
        return gpt_config(self.model, **{"vocab_size": 16384, "num_classes": 1000, "grid": self.grid, **self.changes})


SIZES: Mapping[str, SpeedSize] = {
    "cuda": SpeedSize("GPT-XL", grid=32, images=32, turns=5, steps=4, uncounted=1),
    "cpu": SpeedSize("GPT-B", grid=32, images=4, turns=5, steps=1),
    # Two layers, nine codes, nothing compiled: all of the code, no speed.
    "exercise": SpeedSize("GPT-tiny", 3, 2, turns=2, steps=1, precision="fp32", compiled=(False,), changes=TINY),
}


class Contender(Protocol):
    """``first_loss``: of a step before any was timed."""

    first_loss: float
    warm_up_seconds: float

    def turn(self, steps: int, uncounted: int) -> dict[str, Any]:
        """{"seconds": mean of a step, "cpu_seconds": of all threads, "loss": of the last step, "peak_bytes"};
        RuntimeError with a sentence."""

    def close(self) -> None:
        """Let go of everything."""


class Ours:
    """`GPTTask.step` on random codes."""

    def __init__(self, config: GPTTrainConfig) -> None:
        began = time.perf_counter()
        self._folder = tempfile.TemporaryDirectory()
        self._task: Any = make_task(config, Path(self._folder.name) / "codes")
        self._device, self._done = self._task.device, 0
        self.first_loss = self._steps(1)
        self.warm_up_seconds = time.perf_counter() - began

    def turn(self, steps: int, uncounted: int) -> dict[str, Any]:
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self._steps(uncounted)
        began, worked = time.perf_counter(), time.process_time()
        loss = self._steps(steps)
        seconds, cpu_seconds = (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps
        peak = torch.cuda.max_memory_allocated() if cuda else None
        if cuda:
            torch.cuda.empty_cache()
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "peak_bytes": peak}

    def _steps(self, count: int) -> float:
        """The last loss, read after all of them, as the log reads it; then the device has nothing left to do."""
        loss: Any = math.nan
        for _ in range(count):
            loss = self._task.step(self._done)["loss"]
            self._done += 1
        loss = float(loss)
        upstream_training.synchronize(self._device.type)
        return loss

    def close(self) -> None:
        self._task = None
        self._folder.cleanup()


class Plain:
    """`PlainGPT` in upstream's loop, without DDP, in this process."""

    def __init__(self, size: SpeedSize, device: str, compiled: bool) -> None:
        began = time.perf_counter()
        torch.manual_seed(0)
        codes_BN, labels_B = upstream_training.random_batch(size.images, model_arguments(size.config))
        model = PlainGPT(size.config).to(device)
        options: dict[str, Any] = {"device": device, "precision": size.precision, "compiled": compiled}
        self._loop: Any = upstream_training.Loop(model, codes_BN, labels_B, wrapped=False, **options)
        self.first_loss = self._loop.step()
        self.warm_up_seconds = time.perf_counter() - began

    def turn(self, steps: int, uncounted: int) -> dict[str, Any]:
        return self._loop.turn(steps, uncounted)

    def close(self) -> None:
        self._loop = None


class Theirs:
    """LlamaGen's model in its own loop, in the clone's process."""

    def __init__(self, process: Upstream, size: SpeedSize, device: str, compiled: bool, left: Deadline) -> None:
        config = size.config
        dropouts = ("token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "drop_path_rate")
        model = {**model_arguments(config), **{name: getattr(config, name) for name in dropouts}}
        self._process, self._left = process, left
        job = {"device": device, "precision": size.precision, "images": size.images, "compile": compiled}
        made = self._ask({"do": "make", **job, "model": model, "threads": torch.get_num_threads()})
        if made["parameters"] != config.parameter_count:
            raise RuntimeError(f"its model has {made['parameters']} parameters, ours {config.parameter_count}")
        self.first_loss, self.warm_up_seconds = made["loss"], made["warm_up_seconds"]

    def turn(self, steps: int, uncounted: int) -> dict[str, Any]:
        return self._ask({"do": "turn", "steps": steps, "uncounted": uncounted})

    def close(self) -> None:
        """The process goes on: it lets go of its model when it makes another."""

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        reply = self._process.measure(job, self._left.left)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply


def training_config(size: SpeedSize, device: str, compiled: bool) -> GPTTrainConfig:
    """What `retinar train gpt` would be given for upstream's defaults."""
    return GPTTrainConfig(
        recipe="training-speed",
        model=size.config,
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, grad_clip=1.0, schedule="constant"),
        batch_size=size.images,
        steps=10_000,
        epochs=None,
        precision=size.precision,
        compile=compiled,
        device=device,
        tensorboard=False,
    )
