"""Advancing: a runner turns step inputs into codes, and a loop feeds it.

``Runner.step(inputs) -> codes_I`` is the one way to advance. What lies below differs (eager ops here; CUDA graphs in
`retinar.engine.graphs`; one native call elsewhere); what lies above is the same for all. Nothing here waits for the
device: the scheduler counts positions and never sees a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from retinar.engine.config import GPTConfig
from retinar.engine.kv_cache import KVCache
from retinar.engine.request import Request
from retinar.engine.scheduler import Scheduler
from retinar.engine.step_batch import StepBatch, step_buffers
from retinar.kernels import ops


class Runner(Protocol):
    """One step for all live rows. Owns the cache memory; knows nothing of requests."""

    config: GPTConfig
    cache: KVCache
    device: torch.device

    def buffers(self, max_images: int) -> ops.StepInputs:
        """Padded inputs (`step_buffers`) with room for so many pairs: what `step` is to be given views of."""

    def step(self, inputs: ops.StepInputs) -> Tensor:
        """Write one KV slot a row and return codes_I int64 on the runner's device, valid until the next step."""


class DirectRunner:
    """What runners share that run each step as it comes.

    ``logits_BV`` fp32 are those of the last step, before guidance, for tests and meters.
    """

    def __init__(self, config: GPTConfig, cache: KVCache) -> None:
        self.config, self.cache = config, cache
        self.device = cache.k_LPSGD.device
        self.logits_BV: Tensor | None = None

    def buffers(self, max_images: int) -> ops.StepInputs:
        return step_buffers(self.config, self.cache.page_size, self.cache.scratch_page, max_images, self.device)


class EagerRunner(DirectRunner):
    """``ops.decode_step`` called directly: the reference on any device, or what ``torch.library`` dispatches to."""

    def __init__(
        self, weights: ops.DecodeWeights, config: GPTConfig, cache: KVCache, backend: str | None = None
    ) -> None:
        super().__init__(config, cache)
        self.weights, self.backend = weights, backend

    @torch.inference_mode()
    def step(self, inputs: ops.StepInputs) -> Tensor:
        cache = self.cache
        codes_I, self.logits_BV = ops.decode_step(
            self.weights, cache.k_LPSGD, cache.v_LPSGD, inputs, backend=self.backend
        )
        return codes_I


class NativeRunner(DirectRunner):
    """One call of compiled code a step, with packed weights and threads of its own; on a CPU."""

    def __init__(self, decoder: ops.NativeDecoder, config: GPTConfig, cache: KVCache) -> None:
        super().__init__(config, cache)
        self.decoder = decoder

    def step(self, inputs: ops.StepInputs) -> Tensor:
        cache = self.cache
        codes_I, self.logits_BV = self.decoder.step(
            cache.k_LPSGD, cache.v_LPSGD, inputs, cache.k_scale_LPSG, cache.v_scale_LPSG
        )
        return codes_I


class Finished(NamedTuple):
    """A complete image: ``codes_T`` int64 [block_size] on the runner's device, there once ``ready`` has happened."""

    ticket: int
    request: Request
    codes_T: Tensor
    ready: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """The codes, after waiting for the device to have drawn them."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.codes_T


class DecodeLoop:
    """Scheduler, step tensors and runner in one loop: submit, cancel and step, in any order.

    A library call runs it to the end; a server calls ``step`` for ever, submitting between steps. At most
    ``max_images`` live at once.
    """

    def __init__(self, runner: Runner, max_images: int) -> None:
        config, cache = runner.config, runner.cache
        self.runner = runner
        self.scheduler = Scheduler(config.block_size, cache.page_size, cache.pages, max_images)
        self.batch = StepBatch(config, runner.buffers(max_images))
        self.codes = 0  # drawn by the last step

    def submit(self, request: Request) -> int:
        """Queue a request, returns its ticket; InputError when it can never fit."""
        return self.scheduler.submit(request)

    def cancel(self, ticket: int) -> bool:
        """Drop an image; False when it is unknown or already finished."""
        return self.scheduler.cancel(ticket)

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """One code for every live image, after admitting whoever fits; returns the images that became complete.

        On a GPU the step is queued, not awaited, so admission and layout of the next overlap with it.
        """
        scheduler = self.scheduler
        scheduler.admit()
        self.codes = len(scheduler.live)
        if not scheduler.live:
            return []
        if scheduler.changed:
            self.batch.rebuild(scheduler.live, self.runner.config.num_classes)
            scheduler.changed = False
        self.batch.record(self.runner.step(self.batch.inputs))
        done = scheduler.advance()
        codes = [self.batch.take(image.slot) for image in done]
        ready = self._now() if done else None
        return [Finished(each.ticket, each.request, codes_T, ready) for each, codes_T in zip(done, codes, strict=True)]

    def run(self) -> Iterator[Finished]:
        """Step until nothing is waiting or live."""
        while self.scheduler.busy:
            yield from self.step()

    def _now(self) -> torch.cuda.Event | None:
        """This place in the device's queue."""
        if self.runner.device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps: the host's cores have images to write
        event.record(torch.cuda.current_stream(self.runner.device))
        return event
