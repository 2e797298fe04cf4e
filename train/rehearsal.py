"""A training step on one process of many, rehearsed on fake tensors: the real step, without weights and without peers.

:class:`GPTTask` runs as it is: its model has fake tensors for weights, and the processes beside it are torch's fake
process group, whose collectives do nothing. So FSDP2 gathers and drops, checkpointing computes again and AdamW steps,
on storages of the right size that hold no memory, and a :class:`MemoryTrace` counts them.

The tensors say that they are on a CPU, since FSDP2 asks a CUDA build for streams; attention, dropout and what kernels
allocate for themselves are taken as a GPU's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from retinar.engine.errors import InputError
from retinar.engine.model import GPT, Recompute
from retinar.train.config import GPTTrainConfig
from retinar.train.gpt import GPTTask, attention_backend
from retinar.train.memory_trace import CUDA_BLOCK, Category, MemoryTrace, Scratch, held, with_cuda_dropout
from retinar.train.order import Order
from retinar.train.scratch import SCRATCH
from retinar.train.world import World, launched


@contextmanager
def pretended(size: int) -> Iterator[None]:
    """torch.distributed as in process 0 of ``size``, the others being pretended. InputError among real ones."""
    if launched() or dist.is_initialized():
        raise InputError("Expected --plan in one process, found it in one of several: leave torchrun out.")
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Codes:
    """What a task asks of its codes, for ``images`` images; all are alike."""

    def __init__(self, config: GPTTrainConfig, images: int) -> None:
        self.codes = np.zeros((images, 1, config.model.block_size), np.int32)
        self.labels = np.zeros(images, np.int64)
        self.meta: dict[str, Any] = {"classes": []}

    def __len__(self) -> int:
        return len(self.codes)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one process: what it holds of each kind (of gradients: when the backward pass is over), and the most at
    once during a step, with its parts (:data:`CATEGORIES`)."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    peak: int
    at_peak: dict[Category, int]


class Rehearsal:
    """Process 0 of ``gpus`` with ``config.parallel``; no process holds more. One for several traces of a mode.

    Sharded modes need :func:`pretended` around them. DDP, which asks its peers for their weights, is played: the
    process is alone, and a gradient that DDP would have reduced is put into a bucket, as DDP does.

    Raises InputError as the training would: an attention backend that cannot be, a batch that does not come out even,
    replicas that do not divide.
    """

    def __init__(self, config: GPTTrainConfig, *, gpus: int, gpus_per_machine: int) -> None:
        own = {"compile": False, "guard": "stop", "spike": None, "attention_backend": "auto"}
        self.config = dataclasses.replace(config, **own)  # type: ignore[arg-type]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.model = GPT(config.model)
        with_cuda_dropout(self.model)
        ddp = config.parallel == "ddp"
        world = World(torch.device("cpu"), size=1 if ddp else gpus, local_size=min(gpus, gpus_per_machine))
        codes: Any = _Codes(config, config.batch_size)
        self.task = GPTTask(self.model, self.config, codes, steps=config.total_steps(config.batch_size), world=world)
        self.task.backend = self._attention(config)
        self.parameters: list[nn.Parameter] = list(self.model.parameters())
        self.buckets = [torch.zeros_like(p) for p in self.parameters] if ddp and gpus > 1 else []
        self._warm_up()

    @staticmethod
    def _attention(config: GPTTrainConfig) -> str | None:
        """What keeps as much as the configured attention does on a GPU, for ops.rope_attention: torch's fused one for
        flash, else ours."""
        if config.attention_backend in ("auto", "triton", "reference"):
            return None
        alike = {"attention_backend": "sdpa"} if config.attention_backend == "flash" else {}
        return attention_backend(dataclasses.replace(config, **alike), torch.device("cpu"))  # type: ignore[arg-type]

    def _warm_up(self) -> None:
        """Everything of a step but its parts, once: DTensor works out the shapes of clipping, AdamW and averaging with
        whole tensors, which would be counted, and remembers them."""
        for parameter, gradient in zip_longest(self.parameters, self.buckets):
            parameter.grad = gradient if gradient is not None else torch.zeros_like(parameter)
        self.task.rows, self.task.order = [], Order(1, 1, seed=0, views=1)
        with self.fake:
            self.task.step(0)

    def trace(
        self,
        checkpointing: Recompute,
        micro_batch: int,
        parts: int,
        *,
        block: int = CUDA_BLOCK,
        scratch: Mapping[str, Scratch] = SCRATCH,
    ) -> Memory:
        """A step in ``parts`` parts of ``micro_batch`` images on this process; after the second, a part is like it.

        ``block``, ``scratch``: as :class:`MemoryTrace` has them.
        """
        task, parts = self.task, min(parts, 2)
        self.model.activation_checkpointing = checkpointing
        images = parts * micro_batch
        codes: Any = _Codes(self.config, images)
        task.codes, task.order = codes, Order(images, images, seed=0, views=1)
        task.rows = list(np.arange(images).reshape(parts, micro_batch))
        optimizer = tree_leaves(list(task.optimizer.state.values()))
        averages = list(task.ema.averages.values()) if task.ema is not None else []
        for parameter, bucket in zip(self.parameters, self.buckets, strict=False):
            parameter.grad = bucket if parts > 1 else None  # see Parallel.clear_gradients
        trace = MemoryTrace(fake=self.fake, block=block, scratch=scratch)
        trace.add([*self.parameters, *self.model.buffers()], "parameters")
        trace.add(self.buckets, "gradients")
        trace.add(optimizer, "optimizer")
        trace.add(averages, "ema")
        with _Watch(self, trace, parts) as watch, self.fake, trace:
            task.step(0)
        return Memory(
            parameters=held(self.parameters),
            gradients=watch.gradients,
            optimizer=held(optimizer),
            ema=held(averages),
            peak=trace.peak,
            at_peak=dict(trace.at_peak),
        )


class _Watch:
    """Tells a trace what it cannot see: which tensors are gradients. Plays DDP where the rehearsal does.

    ``gradients``: bytes of them when the backward pass is over.
    """

    def __init__(self, rehearsal: Rehearsal, trace: MemoryTrace, parts: int) -> None:
        self.trace, self.parts, self.part, self.gradients = trace, parts, 0, 0
        self.parameters, self.sharded = rehearsal.parameters, rehearsal.task.parallel.sharded
        pairs = zip(rehearsal.parameters, rehearsal.buckets, strict=False)
        self.buckets: dict[Tensor, Tensor] = dict(pairs)
        self.hooks = [
            rehearsal.model.register_forward_pre_hook(self._begin, prepend=True),
            *(parameter.register_post_accumulate_grad_hook(self._made) for parameter in self.parameters),
            rehearsal.task.optimizer.register_step_pre_hook(self._whole),
        ]

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        self.part += 1
        if self.sharded:  # what is left of the part before: gradients, which FSDP2 reduces with the last part
            self.trace.rename("activations", "gathered")

    def _made(self, parameter: Tensor) -> None:
        if self.part == self.parts and parameter in self.buckets:
            parameter.grad = self.buckets[parameter]
        if parameter.grad is not None:
            self.trace.add([parameter.grad], "gradients")

    def _whole(self, *_: object) -> None:
        self.gradients = held(p.grad for p in self.parameters if p.grad is not None)
