"""Advancing: explicit step inputs, a runner that turns them into codes, and the loop that feeds both.

``Runner.step(inputs) -> codes_I`` is the one way to advance. What lies below differs (eager ops here; a CUDA graph or
one native call elsewhere); what lies above is the same for all. The step inputs live in tensors that are allocated
once and written in place, so their addresses are stable; codes stay on the device until their image is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from retinar.engine.config import GPTConfig
from retinar.engine.kv_cache import KVCache, pages_for
from retinar.engine.request import Request
from retinar.engine.scheduler import LiveImage, Scheduler
from retinar.kernels import ops


class Runner(Protocol):
    """One step for all live rows. Owns the cache memory; knows nothing of requests."""

    config: GPTConfig
    cache: KVCache
    device: torch.device

    def step(self, inputs: ops.StepInputs) -> Tensor:
        """Write one KV slot a row and return codes_I int64, on the runner's device."""


class EagerRunner:
    """``ops.decode_step`` called directly: the reference on any device, or what ``torch.library`` dispatches to.

    ``logits_BV`` fp32 are those of the last step, before guidance, for tests and meters.
    """

    def __init__(
        self, weights: ops.DecodeWeights, config: GPTConfig, cache: KVCache, backend: str | None = None
    ) -> None:
        self.weights, self.config, self.cache, self.backend = weights, config, cache, backend
        self.device = cache.k_LPSGD.device
        self.logits_BV: Tensor | None = None

    @torch.inference_mode()
    def step(self, inputs: ops.StepInputs) -> Tensor:
        cache = self.cache
        codes_I, self.logits_BV = ops.decode_step(
            self.weights, cache.k_LPSGD, cache.v_LPSGD, inputs, backend=self.backend
        )
        return codes_I


class StepBatch:
    """The tensors of a step, [rows or images] long views of buffers with room for ``max_images`` pairs.

    Rows are the live images' conditional rows in order of admission, then the null rows of those still guided.
    Everything is rebuilt only when the set of rows changes (at most three times an image); in between a step costs an
    addition and a gather. ``codes_ST`` [slots, block_size] holds what has been drawn.
    """

    def __init__(self, config: GPTConfig, page_size: int, max_images: int, device: torch.device) -> None:
        rows, self.width = 2 * max_images, pages_for(config.block_size, page_size)
        self.vocab_size, self.device = config.vocab_size, device
        self.codes_ST = torch.zeros(max_images, config.block_size, dtype=torch.int64, device=device)

        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._buffers = ops.StepInputs(
            tokens_B=buffer(rows, dtype=torch.int64),
            positions_B=buffer(rows, dtype=torch.int32),
            block_table_BM=buffer(rows, self.width, dtype=torch.int32),
            cond_row_I=buffer(max_images, dtype=torch.int32),
            null_row_I=buffer(max_images, dtype=torch.int32),
            cfg_scale_I=buffer(max_images, dtype=torch.float32),
            temperature_I=buffer(max_images, dtype=torch.float32),
            top_k_I=buffer(max_images, dtype=torch.int32),
            top_p_I=buffer(max_images, dtype=torch.float32),
            seed_I=buffer(max_images, dtype=torch.int64),
            index_I=buffer(max_images, dtype=torch.int64),
        )
        self.inputs = self._buffers
        self._slot_I = self._image_B = torch.zeros(0, dtype=torch.int64, device=device)

    def rebuild(self, live: list[LiveImage], null_class: int) -> None:
        """Lay out the rows of ``live``; positions come from the scheduler, the last codes from ``codes_ST``."""
        guided = [i for i, image in enumerate(live) if image.guided]
        images, rows = len(live), len(live) + len(guided)
        image_of_row = list(range(images)) + guided
        labels = [image.request.label for image in live] + [null_class] * len(guided)
        tables = [image.cond_pages for image in live] + [live[i].null_pages for i in guided]
        null_rows = [-1] * images
        for row, i in enumerate(guided, start=images):
            null_rows[i] = row
        params = [image.request.params for image in live]

        # unused entries of a table name page 0, a valid address, and are never used: a row stays within its pages
        table_BM = [pages + [0] * (self.width - len(pages)) for pages in tables]
        columns: dict[str, list] = {
            "tokens_B": labels,
            "positions_B": [live[i].position for i in image_of_row],
            "block_table_BM": table_BM,
            "cond_row_I": list(range(images)),
            "null_row_I": null_rows,
            "cfg_scale_I": [p.cfg_scale for p in params],
            "temperature_I": [p.temperature for p in params],
            "top_k_I": [p.top_k if p.top_k < self.vocab_size else 0 for p in params],
            "top_p_I": [p.top_p for p in params],
            "seed_I": [image.request.stream.seed_word for image in live],
            "index_I": [image.request.stream.index for image in live],
        }
        views = {}
        for name, values in columns.items():
            target = getattr(self._buffers, name)
            views[name] = target[:rows] if name.endswith(("_B", "_BM")) else target[:images]
            views[name].copy_(torch.tensor(values, dtype=target.dtype))
        self.inputs = ops.StepInputs(**views)

        self._slot_I = torch.tensor([image.slot for image in live], device=self.device)
        self._image_B = torch.tensor(image_of_row, device=self.device)
        positions_B = self.inputs.positions_B.long()
        last_B = self.codes_ST[self._slot_I[self._image_B], (positions_B - 1).clamp_(min=0)]
        self.inputs.tokens_B.copy_(torch.where(positions_B == 0, self.inputs.tokens_B, last_B))

    def record(self, codes_I: Tensor) -> None:
        """Keep the step's codes and make them the next step's input, without a copy to the host."""
        positions_I = self.inputs.positions_B[: codes_I.shape[0]]
        self.codes_ST[self._slot_I, positions_I.long()] = codes_I
        self.inputs.tokens_B.copy_(codes_I[self._image_B])
        self.inputs.positions_B.add_(1)

    def take(self, slot: int) -> Tensor:
        """The codes [block_size] int64 of a finished image, on the CPU."""
        return self.codes_ST[slot].to("cpu", copy=True)


class Finished(NamedTuple):
    """A complete image: ``codes_T`` int64 [block_size] on the CPU."""

    ticket: int
    request: Request
    codes_T: Tensor


class DecodeLoop:
    """Scheduler, step tensors and runner in one loop: submit, cancel and step, in any order.

    A library call runs it to the end; a server calls ``step`` for ever, submitting between steps.
    """

    def __init__(self, runner: Runner, max_images: int) -> None:
        config, cache = runner.config, runner.cache
        self.runner = runner
        self.scheduler = Scheduler(config.block_size, cache.page_size, cache.pages, max_images)
        self.batch = StepBatch(config, cache.page_size, max_images, runner.device)
        self.codes = 0  # drawn by the last step

    def submit(self, request: Request) -> int:
        """Queue a request, returns its ticket; InputError when it can never fit."""
        return self.scheduler.submit(request)

    def cancel(self, ticket: int) -> bool:
        """Drop an image; False when it is unknown or already finished."""
        return self.scheduler.cancel(ticket)

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """One code for every live image, after admitting whoever fits; returns the images that became complete."""
        scheduler = self.scheduler
        scheduler.admit()
        self.codes = len(scheduler.live)
        if not scheduler.live:
            return []
        if scheduler.changed:
            self.batch.rebuild(scheduler.live, self.runner.config.num_classes)
            scheduler.changed = False
        self.batch.record(self.runner.step(self.batch.inputs))
        return [Finished(done.ticket, done.request, self.batch.take(done.slot)) for done in scheduler.advance()]

    def run(self) -> Iterator[Finished]:
        """Step until nothing is waiting or live."""
        while self.scheduler.busy:
            yield from self.step()
