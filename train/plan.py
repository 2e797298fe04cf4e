"""What fits: the memory that a step takes on each GPU, by parallel mode, activation checkpointing and accumulation.

Every row is a rehearsal (``rehearsal.py``) of the real step. No GPU is needed, and none has been asked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from retinar.engine.errors import InputError
from retinar.engine.model import Recompute
from retinar.engine.progress import Progress, plain
from retinar.train.config import GPTTrainConfig, Parallel
from retinar.train.plan_table import table
from retinar.train.rehearsal import Memory, Rehearsal, pretended

GIB = 2**30
FIXED = 1.5 * GIB
"""Bytes that torch's allocator does not see: the CUDA context, NCCL's buffers, libraries."""
FRAGMENTATION = 0.05
"""Share of the peak that lies idle between tensors."""
MODES: tuple[Parallel, ...] = ("ddp", "sdp", "fsdp", "hsdp")
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)  # from nothing to everything: the fastest first


@dataclass(frozen=True)
class Row:
    """One setting, and its memory on each GPU.

    ``replicas``: groups of shards, of hsdp. ``micro_batch``: images of one part on one GPU. ``needed``: bytes that the
    GPU must have, the peak and what comes on top. ``verified``: whether the peak was measured on a GPU.
    """

    parallel: Parallel
    replicas: int | None
    activation_checkpointing: Recompute
    accumulation: int
    micro_batch: int
    memory: Memory
    needed: int
    fits: bool
    verified: bool = False

    @property
    def slowness(self) -> tuple[int, int, int]:
        """For sorting, the fastest first: little computed twice, little sent between GPUs, large parts."""
        order = {"ddp": 0, "sdp": 1, "fsdp": 3, "hsdp": 2 if (self.replicas or 1) > 1 else 4}
        return RECOMPUTE.index(self.activation_checkpointing), order[self.parallel], self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """JSON values; memory in bytes."""
        memory = self.memory
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:5]},
            "parameters_bytes": memory.parameters,
            "gradients_bytes": memory.gradients,
            "optimizer_bytes": memory.optimizer,
            "ema_bytes": memory.ema,
            "gathered_bytes": memory.at_peak["gathered"],
            "activations_bytes": memory.at_peak["activations"],
            "peak_bytes": memory.peak,
            "needed_bytes": self.needed,
            "fits": self.fits,
            "verified": self.verified,
        }


@dataclass(frozen=True)
class Plan:
    """``rows`` by mode, checkpointing and accumulation; ``best``: the fastest that fits, None where none does."""

    config: GPTTrainConfig
    gpus: int
    gpu_memory: float
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        return min((row for row in self.rows if row.fits), key=lambda row: row.slowness, default=None)

    @property
    def assumptions(self) -> list[str]:
        """What the figures rest on, a sentence each."""
        return [
            "The peak is unverified (no GPU run): it is counted on fake tensors, op by op.",
            f"A GPU is taken to need the peak, {FRAGMENTATION:.0%} more for gaps between tensors, and {FIXED / GIB:g} "
            "GiB for the CUDA context and NCCL.",
            "torch.compile is not traced: a compiled step usually keeps less.",
            "Attention, dropout and the buffers of kernels are those of a GPU with Triton.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; memory in bytes. :func:`plan_table.table` makes text of them."""
        return {
            "recipe": self.config.recipe,
            "parameters": self.config.model.parameter_count,
            "batch_size": self.config.batch_size,
            "precision": self.config.precision,
            "gpus": self.gpus,
            "gpu_memory_gib": self.gpu_memory,
            "rows": [row.to_dict() for row in self.rows],
            "best": None if self.best is None else self.best.to_dict(),
            "assumptions": self.assumptions,
        }

    def text(self) -> str:
        """The table, what is recommended, and the assumptions."""
        return table(self.to_dict())


def plan(
    config: GPTTrainConfig, *, gpus: int, gpu_memory: float, gpus_per_machine: int = 8, progress: Progress = plain
) -> Plan:
    """The memory of ``config``'s step on each of ``gpus`` GPUs of ``gpu_memory`` GiB, under every mode.

    What ``config`` says of mode, checkpointing and accumulation is one row among others; the batch stays. Of each mode
    and checkpointing the smallest accumulation is looked for that fits. Takes a few seconds for each row, and little
    memory. InputError: numbers that are no numbers of GPUs or GiB, and a batch or replicas that do not come out even.
    """
    _check(config, gpus, gpu_memory, gpus_per_machine)
    modes = MODES if gpus > 1 else MODES[:1]
    replicas = config.replicas or max(1, gpus // min(gpus, gpus_per_machine))
    rows: list[Row] = []
    with pretended(gpus), progress("plan", len(modes) * len(RECOMPUTE)) as bar:
        for mode in modes:
            own = replicas if mode == "hsdp" else None
            if own == 1:  # one group of shards: fsdp by another name
                same = [row for row in rows if row.parallel == "fsdp"]
                rows += [dataclasses.replace(row, parallel=mode, replicas=own) for row in same]
                bar.advance(len(RECOMPUTE))
                continue
            chosen = dataclasses.replace(config, parallel=mode, replicas=own)
            rehearsal = Rehearsal(chosen, gpus=gpus, gpus_per_machine=gpus_per_machine)
            for recompute in RECOMPUTE:
                for accumulation, memory, needed in _search(rehearsal, recompute, gpus, gpu_memory * GIB):
                    micro_batch = config.batch_size // (gpus * accumulation)
                    fits = needed <= gpu_memory * GIB
                    rows.append(Row(mode, own, recompute, accumulation, micro_batch, memory, needed, fits))
                bar.advance(1)
    return Plan(config, gpus, gpu_memory, tuple(rows))


def _search(rehearsal: Rehearsal, recompute: Recompute, gpus: int, limit: float) -> Iterator[tuple[int, Memory, int]]:
    """(accumulation, memory, bytes needed) from one part on to the first that fits, and of the config's own."""
    config = rehearsal.config
    images = config.batch_size // gpus
    powers = {1 << power for power in range(images.bit_length()) if images % (1 << power) == 0}
    found, least = False, 0.0
    for accumulation in sorted({config.accumulation, *powers}):
        if accumulation != config.accumulation and (found or accumulation < least):
            continue
        memory = rehearsal.trace(recompute, images // accumulation, accumulation)
        needed = int(memory.peak * (1 + FRAGMENTATION) + FIXED)
        found = found or needed <= limit
        # The k-th part of a batch keeps at least a k-th of the activations, and all that was there beside them.
        activations = memory.at_peak["activations"]
        room = (limit - FIXED) / (1 + FRAGMENTATION) - (memory.peak - activations)
        least = accumulation * activations / room if room > 0 else math.inf
        yield accumulation, memory, needed


def _check(config: GPTTrainConfig, gpus: int, gpu_memory: float, gpus_per_machine: int) -> None:
    for flag, count in (("--gpus", gpus), ("--gpus-per-machine", gpus_per_machine)):
        if count < 1:
            raise InputError(f"Expected {flag} of at least 1, found {count}: give the number there is.")
    if not (gpu_memory > 0 and math.isfinite(gpu_memory)):
        raise InputError(f"Expected --gpu-memory above 0 GiB, found {gpu_memory:g}: give what one GPU has.")
    if gpus % (config.replicas or 1):
        raise InputError(
            f"Expected replicas to divide --gpus {gpus}, found {config.replicas}: set replicas to a divisor."
        )
    if config.batch_size % (gpus * config.accumulation):
        raise InputError(
            f"Expected batch_size to be a multiple of --gpus {gpus} times accumulation {config.accumulation}, found "
            f"{config.batch_size}: set batch_size or accumulation, or plan for another number of GPUs."
        )
