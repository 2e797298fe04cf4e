"""Real runs for test_plan.py: ``python -m tests.train.plan_run OUT CODES SETTINGS``, SETTINGS as JSON.

{processes: [[mode, checkpointing, accumulation], ...]}: a few steps of a small model in each setting. What every
process held goes to OUT/processes-mode-checkpointing-accumulation.json.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2 would import it in every process
from torch import Tensor
from torch.utils._pytree import tree_leaves

from retinar.engine.model import GPT
from retinar.train.code_files import CodeSet
from retinar.train.config import GPTTrainConfig
from retinar.train.gpt import GPTTask
from retinar.train.memory_trace import MemoryTrace, held, with_cuda_dropout
from retinar.train.rng import seed_everything
from retinar.train.world import World, joined
from tests.train.tiny import tiny_config

BATCH = 16
CODES = 61


def odd_config(mode: str, checkpointing: str, accumulation: int, **changes: Any) -> GPTTrainConfig:
    """Rows that neither 2 nor 4 processes divide: 61 codes, 3 classes with the null class, 2 x 63 of the gate."""
    values: dict[str, Any] = {
        "parallel": mode,
        "replicas": 2 if mode == "hsdp" else None,
        "activation_checkpointing": checkpointing,
        "batch_size": BATCH,
        "accumulation": accumulation,
        "precision": "bf16",
        "attention_backend": "reference",
    }
    config = tiny_config(**{**values, **changes})
    sizes = {"vocab_size": CODES, "multiple_of": 7, "dim": 24, "n_layer": 2}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))


def measure(world: World, config: GPTTrainConfig, codes: CodeSet) -> dict[str, int]:
    """Bytes on this process: parameters, gradients before AdamW takes them, its state, averages, and the most alive at
    once in a step."""
    seed_everything(0)
    model = GPT(config.model)
    with_cuda_dropout(model)
    task = GPTTask(model, config, codes, steps=10, world=world)
    parameters = list(model.parameters())
    gradients: list[Tensor] = []

    def keep(*_: object) -> None:
        gradients[:] = [p.grad for p in parameters if p.grad is not None]

    hook = task.optimizer.register_step_pre_hook(keep)
    for step in range(2 if config.parallel == "ddp" else 1):  # DDP arranges its buckets anew after the first
        task.step(step)
    hook.remove()
    state = tree_leaves(list(task.optimizer.state.values()))
    averages = list(task.ema.averages.values()) if task.ema is not None else []
    trace = MemoryTrace()
    trace.add([*parameters, *model.buffers()], "parameters")
    trace.add(state, "optimizer")
    trace.add(averages, "ema")
    found = {name: held(tensors) for name, tensors in (("gradients", gradients), ("optimizer", state))}
    if config.parallel == "ddp" and world.size > 1:
        trace.add(gradients, "gradients")  # its buckets stay
    gradients.clear()
    with trace:
        task.step(2)
    return {**found, "parameters": held(parameters), "ema": held(averages), "peak": trace.peak}


def member(rank: int, size: int, port: int, out: Path, codes: Path, settings: list[tuple[str, str, int]]) -> None:
    """Process ``rank`` of ``size``."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}})
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for setting in settings:
            found = world.gather(measure(world, odd_config(*setting), CodeSet(codes)))
            if world.main:
                (out / f"{'-'.join(map(str, (size, *setting)))}.json").write_text(json.dumps(found))


def main(out: Path, codes: Path, every: dict[str, list[tuple[str, str, int]]]) -> int:
    """Forks the processes, so that torch is imported once; the first exit code that is not 0."""
    fork = multiprocessing.get_context("fork")
    for size, settings in every.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = int(size), port, out, codes, settings
        members = [fork.Process(target=member, args=(rank, *common)) for rank in range(int(size))]
        for process in members:
            process.start()
        for process in members:
            process.join(120)
            process.kill()
        if wrong := next((process.exitcode for process in members if process.exitcode), 0):
            return wrong
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])))
