"""The steps that decoding on a CPU is measured with: plain torch's and ours, on the same weights and the same cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retinar.bench.baselines import static_cache
from retinar.bench.baselines.eager_step import EagerStep
from retinar.bench.decoding_sizes import STATIC, Case, DecodingSize, random_weights
from retinar.bench.decoding_state import filled_cache, on_one_page, step_inputs
from retinar.bench.sampling_sizes import CFG_SCALE
from retinar.bench.steps import timed_steps
from retinar.engine.kv_cache import KVCache
from retinar.kernels import ops

WARM_UP = 2
UNCLOCKED = 5
"""Steps before the decoder's clock starts: the first ones wake its threads, in the time of their first phase."""
Step = Callable[[], Tensor]
"""() -> logits fp32 [2 * images, V]; its codes go into the next, at the same position."""


def timed(step: Callable[[], object], size: DecodingSize, seconds: float) -> list[float]:
    """Seconds of each step, of as many as fit into ``seconds``."""
    began = time.perf_counter()
    first = timed_steps(step, 1, "cpu", warm_up=WARM_UP)[0]
    left = seconds - (time.perf_counter() - began)
    count = min(size.most, max(size.least, int(left / max(first, 1e-6))))
    return timed_steps(step, count, "cpu", warm_up=0)


class ModelSteps:
    """A model's random weights, plain and packed; after `start`, the steps of so many guided images.

    ``native_missing``: why ours cannot run, or None.
    """

    def __init__(self, size: DecodingSize, case: Case, threads: int, *, exercise: bool) -> None:
        self.size, self.exercise, self.config = size, exercise, size.config(case)
        self.weights = random_weights(self.config, size.dtype)
        self.native_missing = ops.native_info()["reason"]
        self.decoders: dict[torch.dtype, ops.NativeDecoder] = {}
        if self.native_missing is None:
            for dtype in (size.dtype, torch.int8):
                self.decoders[dtype] = ops.NativeDecoder(self.weights, int8=dtype == torch.int8, threads=threads)

    def start(self, images: int) -> None:
        """Inputs and a cache for the last slot of the context."""
        self.images, self.position = images, self.size.context - 1
        self.inputs = step_inputs(self.config, images, self.position, self.size.page_size)
        self.cache = filled_cache(self.config, 2 * images, self.size, self.size.dtype)
        self.int8_cache: KVCache | None = None

    def eager(self) -> Step:
        """As LlamaGen's modules make it."""
        module = EagerStep(self.weights, self.images, self.config.block_size)
        module.load(self.cache.k_LPSGD, self.cache.v_LPSGD, self.inputs.block_table_BM)
        return _advancing(module, self.inputs.tokens_B.clone(), self.position)

    def compiled(self, name: str) -> tuple[Step, float]:
        """(torch.compile's step of that name, seconds of compiling it)."""
        length = self.config.block_size if name == STATIC else self.size.context
        tokens_B = self.inputs.tokens_B.clone()
        began = time.perf_counter()
        module = static_cache.StaticCacheStep(self.weights, self.images, length, fused=True)
        static_cache.copy_cache(module, self.cache.k_LPSGD, self.cache.v_LPSGD, self.inputs.block_table_BM)
        example = tokens_B, torch.tensor([self.position]), CFG_SCALE
        step = static_cache.frozen(module, "exercise" if self.exercise else "cpu", *example)
        return _advancing(step, tokens_B, self.position), time.perf_counter() - began

    def ours(self, weights: torch.dtype, cache: torch.dtype) -> Step:
        return self._native(weights, cache, self.inputs)

    def where(self, weights: torch.dtype, cache: torch.dtype) -> dict[str, Any]:
        """Where the time of ours goes: ``phases``, by the decoder's own clock over a few more steps; and the time of a
        step that attends over one page at most, hence what the cache costs."""
        decoder = self.decoders[weights]
        clock = torch.zeros(len(decoder.phases), dtype=torch.float64)
        step = self._native(weights, cache, self.inputs, clock)
        for _ in range(UNCLOCKED):
            step()
        clock.zero_()
        for _ in range(self.size.clocked):
            step()
        spent = (clock / self.size.clocked).tolist()
        phases = [{"name": name, "seconds": each} for name, each in zip(decoder.phases, spent, strict=True)]
        short = self._native(weights, cache, on_one_page(self.inputs, self.position, self.size.page_size))
        return {"phases": phases, "short_step_p50": statistics.median(timed(short, self.size, self.size.seconds / 4))}

    def _native(
        self, weights: torch.dtype, cache: torch.dtype, inputs: ops.StepInputs, clock: Tensor | None = None
    ) -> Step:
        decoder, kept = self.decoders[weights], self._cache(cache)
        inputs = inputs._replace(tokens_B=inputs.tokens_B.clone())
        caches = kept.k_LPSGD, kept.v_LPSGD
        scales = kept.k_scale_LPSG, kept.v_scale_LPSG

        def step() -> Tensor:
            codes_I, logits_BV = decoder.step(*caches, inputs, *scales, seconds=clock)
            inputs.tokens_B.copy_(codes_I.repeat(2))
            return logits_BV

        return step

    def _cache(self, dtype: torch.dtype) -> KVCache:
        """In int8 it is made when first asked for."""
        if dtype != torch.int8:
            return self.cache
        if self.int8_cache is None:
            self.int8_cache = filled_cache(self.config, 2 * self.images, self.size, dtype, like=self.cache)
        return self.int8_cache


def _advancing(step: Callable[..., tuple[Tensor, Tensor]], tokens_B: Tensor, position: int) -> Step:
    """A call that makes a step at one position and gives its tokens to the next."""
    position_1 = torch.tensor([position])

    def advance() -> Tensor:
        next_B, logits_BV = step(tokens_B, position_1, CFG_SCALE)
        tokens_B.copy_(next_B)
        return logits_BV

    return advance
