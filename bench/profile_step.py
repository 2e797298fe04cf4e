"""The profile of the default training step: `profile` reads it, `training` makes the step."""

from __future__ import annotations

import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retinar.bench import profile
from retinar.bench.checks import first_line
from retinar.bench.deadline import Deadline
from retinar.bench.training import RECIPE, make_task, step_config
from retinar.train.gpt import GPTTask

COMPILE_SECONDS = 150
"""What torch.compile may take for GPT-XL's blocks; with less time left the step is profiled uncompiled."""
TIMED, PROFILED = 5, 2


def profile_step(device: str, deadline: Deadline) -> dict[str, Any]:
    """`profile.describe` of the default step with its time and peak memory; "wrong": sentences on what is amiss.

    Compiled as the recipe has it where that fits in time; a compilation that fails is told, and the step profiled
    uncompiled.
    """
    wrong: list[str] = []
    for compile_layers in (True, False):
        if compile_layers and (device == "cpu" or not deadline.fits(COMPILE_SECONDS)):
            continue
        try:
            found = _profile(device, compile_layers)
        except Exception as error:
            traceback.print_exc()
            how = "compiled" if compile_layers else "uncompiled"
            wrong.append(f"the {how} training step on {device}: {type(error).__name__}: {first_line(error)}")
            continue
        wrong += [f"the training step does not use the kernel {name}" for name in found["missing"]]
        wrong += [f"the training step runs {name} beside our kernels" for name in found["replaced"]]
        return {**found, "wrong": wrong}
    return {"wrong": wrong}


def _profile(device: str, compile_layers: bool) -> dict[str, Any]:
    config = step_config(device, compile_layers=compile_layers)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(config, Path(folder) / "codes")
        recorded, seconds, peak = record(task, device)
        found = profile.describe(recorded, steps=PROFILED if device == "cuda" else 1)
    tokens = config.batch_size * config.model.block_size
    size = f"{config.model.n_layer} layers, width {config.model.dim}, {config.model.parameter_count / 1e6:.3g} M"
    return {
        "recipe": RECIPE,
        "model": size,
        "batch": config.batch_size,
        "precision": config.precision,
        "compiled": config.compile,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "peak_bytes": peak,
        **found,
    }


def record(task: GPTTask, device: str) -> tuple[torch.profiler.profile, float, int | None]:
    """(the profile, seconds of a step without the profiler, peak memory): warmed up first."""
    timed = TIMED if device == "cuda" else 1
    done = 0

    def step() -> None:
        nonlocal done
        task.step(done)
        done += 1

    for _ in range(3 if device == "cuda" else 0):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(_seconds(step, device) for _ in range(timed))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    with torch.profiler.profile(activities=profile.activities(device), acc_events=True) as recorded:
        for _ in range(PROFILED if device == "cuda" else 1):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    return recorded, seconds, peak


def _seconds(call: Callable[[], None], device: str) -> float:
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
