"""Times, and the limits that they are held against, measured in the same run.

A time is the median of many runs over inputs that rotate, so that the cache is cold; on a GPU it comes from CUDA
events. The limits are what a plain copy and a plain matrix product reach on this device now, not the data sheet.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

COLD_BYTES = 256 * 2**20  # inputs rotate over at least this much: more than the last-level cache of any current device
MAX_COPIES = 64


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    fastest: float
    slowest: float
    runs: int


class Limits(NamedTuple):
    """What the device reached in this run."""

    bytes_per_s: float
    flops_per_s: float


def copies(case_bytes: int, budget: int = COLD_BYTES) -> int:
    """How many copies of a case's inputs to rotate over, so that none is in the cache when its turn comes."""
    return max(1, min(MAX_COPIES, -(-budget // max(case_bytes, 1))))


def measure(
    calls: Sequence[Callable[[], object]], device: str, *, seconds: float = 0.3, least: int = 5, most: int = 200
) -> Timing:
    """Run ``calls`` (equal work on different memory) in turn for about ``seconds`` and take the times of each run."""
    turn = itertools.cycle(calls)
    for _ in range(min(len(calls), 3)):
        next(turn)()
    if device == "cuda":
        return _events(turn, seconds, least, most)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < stop):
        call = next(turn)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return _summary(times)


def _events(turn: itertools.cycle[Callable[[], object]], seconds: float, least: int, most: int) -> Timing:
    torch.cuda.synchronize()
    start = time.perf_counter()
    next(turn)()
    torch.cuda.synchronize()
    runs = max(least, min(most, int(seconds / max(time.perf_counter() - start, 1e-6))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in marks:
        begin.record()
        next(turn)()
        end.record()
    torch.cuda.synchronize()
    return _summary([begin.elapsed_time(end) / 1e3 for begin, end in marks])


def _summary(times: list[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times))


def limits(device: str, dtype: torch.dtype = torch.float32, *, seconds: float = 0.5) -> Limits:
    """Bandwidth of a copy (bytes read plus bytes written) and rate of a square matrix product in ``dtype``.

    They are what plain torch reaches, not what the hardware could: an op that does better has a share above one.
    """
    size = (2**30 if device == "cuda" else COLD_BYTES) // 4
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, seconds=seconds)
    side = 8192 if device == "cuda" else 1024
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    product = measure([lambda: left @ right], device, seconds=seconds)
    return Limits(2 * 4 * size / copy.median, 2 * side**3 / product.median)


def share(seconds: float, moved_bytes: int, flops: int, limit: Limits) -> float:
    """The time that the limits allow over the time taken: 1.0 is as fast as this device can."""
    return max(moved_bytes / limit.bytes_per_s, flops / limit.flops_per_s) / seconds
