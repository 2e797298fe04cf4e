"""Where a run computes: the device, the autocast region, and torch.compile where it can work."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from retinar.engine.device import find_device
from retinar.engine.errors import InputError
from retinar.train.config import GPTTrainConfig, Precision, TrainConfig


def pick_device(name: str) -> torch.device:
    """The device a config names; "auto" is the GPU where there is one. InputError for what is not there."""
    return find_device(None if name == "auto" else name)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The region for forward passes: bf16 matrix products under "bf16" (weights stay fp32), nothing under "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compile_parts(parts: Iterable[nn.Module], device: torch.device) -> None:
    """torch.compile every module in place (state dicts keep their names); a printed line where that cannot work."""
    if device.type == "cuda":
        missing = None if importlib.util.find_spec("triton") else "triton"
    else:
        missing = None if any(shutil.which(name) for name in ("c++", "g++", "clang++")) else "a C++ compiler"
    if missing is not None:
        print(f"torch.compile needs {missing}: training uncompiled.", file=sys.stderr, flush=True)
        return
    import torch._dynamo  # seconds: only where it is needed

    held = list(parts)
    # A part has graphs of its own for training, evaluation and each rate of stochastic depth; torch gives up at eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(held))
    torch._dynamo.config.optimize_ddp = False  # it would cut each part into DDP's buckets; parts overlap already
    for part in held:
        part.compile()


@contextmanager
def memory_advice(config: TrainConfig, processes: int = 1) -> Iterator[None]:
    """Where a GPU's memory is too small, an InputError that names what would save some, in order of what it costs."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        ways, batch = [], config.batch_size
        transformer = isinstance(config, GPTTrainConfig)
        if getattr(config, "activation_checkpointing", None) in ("none", "selective"):
            ways.append("activation_checkpointing=full" + " (or selective)" * transformer)
        more = [n for n in range(config.accumulation + 1, batch + 1) if not batch % n and not batch // n % processes]
        if processes > 1 and config.parallel != "ddp":  # parts would keep whole gradients between them there
            ways.append("a smaller batch_size, or more GPUs")
        elif more:
            ways.append(f"accumulation={more[0]}")
        if config.parallel in ("ddp", "sdp"):
            ways.append("parallel=fsdp under torchrun")
        advice = ", ".join(ways) or "a smaller model"
        plan = "; `retinar train gpt --plan` shows what fits" if transformer else ""
        raise InputError(
            f"Expected a step to fit into the GPU's {total:.0f} GiB, found it out of memory: set {advice}{plan}."
        ) from error
