"""What bounds a decode step on a CPU: bytes over the bandwidth of reading, products over the rate of a large one.

The bandwidth is that of torch summing fp32 numbers out of more memory than any cache holds, with as many threads as
the steps have. On a shared machine it drifts from minute to minute, so it is taken just before and just after whatever
it is held against.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from retinar.bench.steps import DECODE_STEP, case_of, step_bytes
from retinar.engine.config import GPTConfig

PASSES = 4
"""Of a measurement, whose median counts, after one that does not."""


class Rates(NamedTuple):
    """What the machine allows at a moment; no rate of products where torch has none of that dtype."""

    bytes_per_s: float
    flops_per_s: float | None

    def said(self) -> str:
        """In giga."""
        products = "" if self.flops_per_s is None else f", {self.flops_per_s / 1e9:.0f} GFLOP/s"
        return f"{self.bytes_per_s / 1e9:.1f} GB/s{products}"


class Work(NamedTuple):
    """Of one step: bytes of weights, bytes of cache, and operations of the products with weights."""

    weight_bytes: int
    cache_bytes: int
    flops: int


def limit(work: Work, *rates: Rates) -> float | None:
    """Seconds at the mean of some rates: the weights are read while they are multiplied, the cache besides."""
    read = statistics.mean(each.bytes_per_s for each in rates)
    known = [each.flops_per_s for each in rates if each.flops_per_s is not None]
    if len(known) < len(rates):
        return None
    return max(work.weight_bytes / read, work.flops / statistics.mean(known)) + work.cache_bytes / read


def work_of(config: GPTConfig, images: int, context: int, weights: torch.dtype, cache: torch.dtype) -> Work:
    """A step of guided images that all attend over ``context`` slots; int8 comes with its fp32 scales."""
    plain = case_of(config, 0)
    elements, flops = DECODE_STEP.bytes(plain, 1), 2 * DECODE_STEP.bytes(plain, 1) * 2 * images
    kept = step_bytes(config, images, context - 1, 1) - elements
    scales = 4 * (config.n_layer * _outputs(config) + config.vocab_size) if weights == torch.int8 else 0
    slots = 4 * kept // config.head_dim if cache == torch.int8 else 0
    return Work(elements * weights.itemsize + scales, kept * cache.itemsize + slots, flops)


def _outputs(config: GPTConfig) -> int:
    """Output channels of a layer's matrices."""
    return 2 * config.dim + (config.n_head + 2 * config.kv_heads) * config.head_dim + 2 * config.ffn_hidden


class ReadLoop:
    """Sums ``size`` bytes, again and again."""

    def __init__(self, size: int) -> None:
        # numpy asks the system for large pages, torch does not: fewer misses of address translation, a harder bound.
        self.numbers = torch.from_numpy(np.full(size // 4, 1.5, np.float32))

    def bytes_per_s(self) -> float:
        """Read now."""
        return self.numbers.nbytes / _median(self.numbers.sum)


def product_rate(side: int, dtype: torch.dtype) -> float | None:
    """Operations a second of a square product (bf16 or int8, which oneDNN does); None where torch has none."""
    if dtype == torch.int8:
        left, right = (torch.randint(-127, 128, (side, side), dtype=torch.int8) for _ in range(2))
        product: Callable[[], object] = lambda: torch._int_mm(left, right)  # noqa: E731
    else:
        left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
        product = lambda: left @ right  # noqa: E731
    try:
        product()
    except RuntimeError:
        return None
    return 2 * side**3 / _median(product)


def _median(call: Callable[[], object]) -> float:
    seconds = []
    call()
    for _ in range(PASSES):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
