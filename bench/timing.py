"""Times, and the limits that they are held against, measured in the same run.

A time is the median of many runs over inputs that rotate, so that the cache is cold. On a GPU a sample is a batch of
calls between two CUDA events, queued behind a kernel that sleeps: while it sleeps the host gets ahead, so that the
events see the calls back to back and not the host's work (dispatch, autograd), which takes longer than a small kernel.
The limits are what a plain copy and a plain matrix product of random numbers reach on this device now, not the data
sheet (of zeros and ones a product is faster: they switch fewer transistors).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

COLD_BYTES = 256 * 2**20  # inputs rotate over at least this much: more than the last-level cache of any current device
MAX_COPIES = 64
WARM_UP = 3
BATCH_SECONDS = 2e-3  # of GPU time in a sample: the events' own resolution (0.5 us) and the first launch vanish in it
MAX_BATCH = 50  # of calls: what is queued stays below the driver's 1024 launches for ops of a few kernels
SLEEP_SECONDS = 0.1  # at most, to get ahead


class Timing(NamedTuple):
    """Seconds of one call. ``queued``: the host was ahead the whole time, so nothing but the device's work is in it."""

    median: float
    fastest: float
    slowest: float
    runs: int
    queued: bool = True


class Limits(NamedTuple):
    """What the device reached in this run."""

    bytes_per_s: float
    flops_per_s: float


class Device(Protocol):
    """What timing needs of a GPU; tests give a made-up one."""

    def event(self) -> Any:
        """A recorded event: ``elapsed_time(later)`` in ms after a synchronisation, ``query()``: whether it is over."""

    def sleep(self, seconds: float) -> None:
        """Queue a kernel that does nothing for about so long."""

    def synchronize(self) -> None: ...

    def now(self) -> float:
        """Seconds of the host's clock."""


class Cuda:
    """The current CUDA device and stream."""

    def __init__(self) -> None:
        torch.cuda._sleep(1_000_000)  # the clocks come up
        cycles = 20_000_000
        start = self.event()
        torch.cuda._sleep(cycles)
        end = self.event()
        self.synchronize()
        self.cycles_per_s = cycles / (start.elapsed_time(end) / 1e3)

    def event(self) -> Any:
        found = torch.cuda.Event(enable_timing=True)
        found.record()
        return found

    def sleep(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self.cycles_per_s))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def now(self) -> float:
        return time.perf_counter()


def copies(case_bytes: int, budget: int = COLD_BYTES) -> int:
    """How many copies of a case's inputs to rotate over, so that none is in the cache when its turn comes."""
    return max(1, min(MAX_COPIES, -(-budget // max(case_bytes, 1))))


def measure(
    calls: Sequence[Callable[[], object]], device: str, *, seconds: float = 0.3, least: int = 5, most: int = 200
) -> Timing:
    """Run ``calls`` (equal work on different memory) in turn for about ``seconds`` and take the times of each run."""
    turn = itertools.cycle(calls)
    for _ in range(min(len(calls), WARM_UP)):
        next(turn)()
    if device == "cuda":
        return measure_queued(turn, Cuda(), seconds, least, most)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < stop):
        call = next(turn)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return _summary(times, len(times))


def measure_queued(
    turn: itertools.cycle[Callable[[], object]], device: Device, seconds: float, least: int, most: int
) -> Timing:
    """Samples of batches, each queued behind a sleep (see above), until ``seconds`` are over."""

    def sample(batch: int, sleep: float) -> tuple[float, float, bool]:
        """(device's, host's) seconds of a batch, and whether the host was ahead."""
        device.synchronize()
        if sleep:
            device.sleep(sleep)
        start, began = device.event(), device.now()
        for _ in range(batch):
            next(turn)()
        end, host = device.event(), device.now() - began
        ahead = not start.query()
        device.synchronize()
        return start.elapsed_time(end) / 1e3, host, ahead

    work, host, _ = sample(1, 0.0)
    work, host, _ = sample(1, min(SLEEP_SECONDS, 2 * host))
    batch = max(1, min(MAX_BATCH, int(BATCH_SECONDS / max(work, 1e-7))))
    sleep = min(SLEEP_SECONDS, 2 * batch * host + 1e-4)
    if work > seconds / least:
        least = 2
    times: list[float] = []
    queued = True
    stop = device.now() + seconds
    while len(times) < least or (len(times) < most and device.now() < stop):
        work, host, ahead = sample(batch, sleep)
        if not ahead and 2 * sleep <= SLEEP_SECONDS:
            sleep *= 2
            continue
        queued &= ahead
        times.append(work / batch)
    return _summary(times, batch * len(times), queued)


def _summary(times: list[float], runs: int, queued: bool = True) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), runs, queued)


def limits(device: str, dtype: torch.dtype = torch.float32, *, seconds: float = 0.5) -> Limits:
    """Bandwidth of a copy (bytes read plus bytes written) and rate of a square matrix product in ``dtype``.

    They are what plain torch reaches, not what the hardware could: an op that does better has a share above one.
    """
    size = (2**30 if device == "cuda" else COLD_BYTES) // 4
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, seconds=seconds)
    side = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = measure([lambda: left @ right], device, seconds=seconds)
    return Limits(2 * 4 * size / copy.median, 2 * side**3 / product.median)


def share(seconds: float, moved_bytes: int, flops: int, limit: Limits) -> float:
    """The time that the limits allow over the time taken: 1.0 is as fast as this device can."""
    return allowed(moved_bytes, flops, limit) / seconds


def allowed(moved_bytes: int, flops: int, limit: Limits) -> float:
    """The least seconds for so many bytes and FLOPs."""
    return max(moved_bytes / limit.bytes_per_s, flops / limit.flops_per_s)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that a call held at once beyond what was there before it, after one call to warm up."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = itertools.accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns()))
    return max(held, default=0)
