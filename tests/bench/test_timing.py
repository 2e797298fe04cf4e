"""Times are those of the work: rotated, queued behind a sleep on a GPU, held against limits of the same run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from retinar.bench import timing
from retinar.bench.deadline import Deadline

LIMIT = timing.Limits(1e9, 1e10)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, max(device.free, device.clock)

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)

    def query(self) -> bool:
        return self.device.clock >= self.at


class Device:
    """A GPU with a queue: ``clock`` is the host's time, ``free`` when the queue runs empty."""

    def __init__(self) -> None:
        self.clock = self.free = 0.0

    def event(self) -> Event:
        return Event(self)

    def sleep(self, seconds: float) -> None:
        self.free = max(self.free, self.clock) + seconds

    def synchronize(self) -> None:
        self.clock = max(self.clock, self.free)

    def now(self) -> float:
        return self.clock

    def call(self, host: float, work: float, waits: bool = False) -> Callable[[], None]:
        def run() -> None:
            self.clock += host
            self.free = max(self.free, self.clock) + work
            if waits:
                self.synchronize()

        return run


@pytest.mark.parametrize("host", [1e-6, 1e-4, 3e-4])
def test_the_hosts_work_is_not_in_a_gpu_time(host: float) -> None:
    device = Device()
    found = timing.measure_queued(itertools.cycle([device.call(host, 2e-5)]), device, 0.05, 5, 200)
    assert found.median == pytest.approx(2e-5) == found.slowest
    assert found.queued and found.runs > 5


def test_a_call_that_waits_for_the_device_says_that_the_host_is_in_its_time() -> None:
    device = Device()
    found = timing.measure_queued(itertools.cycle([device.call(1e-4, 2e-5, waits=True)]), device, 0.05, 5, 200)
    assert not found.queued and found.median > 1e-4


def test_a_slow_call_is_measured_twice() -> None:
    device = Device()
    found = timing.measure_queued(itertools.cycle([device.call(1e-4, 2.0)]), device, 0.3, 5, 200)
    assert found.runs == 2 and found.median == pytest.approx(2.0)


def test_measure_takes_the_time_that_passes() -> None:
    found = timing.measure([lambda: time.sleep(0.01)], "cpu", seconds=0.05, least=3)
    assert found.fastest <= found.median <= found.slowest
    assert 0.01 <= found.median < 0.1
    assert found.runs >= 3


def test_measure_rotates_the_calls() -> None:
    seen: list[int] = []
    timing.measure([lambda index=index: seen.append(index) for index in range(3)], "cpu", seconds=0, least=9)  # type: ignore[misc]
    assert seen[-9:] == [0, 1, 2] * 3


def test_copies_exceed_the_cache_and_stay_bounded() -> None:
    assert timing.copies(timing.COLD_BYTES) == 1
    assert timing.copies(timing.COLD_BYTES // 8) * (timing.COLD_BYTES // 8) >= timing.COLD_BYTES
    assert timing.copies(1) == timing.MAX_COPIES


def test_share_is_the_tighter_limit() -> None:
    assert timing.share(1.0, 10**9, 0, LIMIT) == 1.0
    assert timing.share(2.0, 10**9, 10**10, LIMIT) == 0.5
    assert timing.share(1.0, 10**8, 5 * 10**9, LIMIT) == 0.5


def test_limits_are_measured_on_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 2**24)
    drawn: list[tuple[int, ...]] = []
    original = torch.randn

    def randn(*shape: int, **options: Any) -> torch.Tensor:
        drawn.append(shape)
        return original(*shape, **options)

    monkeypatch.setattr(torch, "randn", randn)
    found = timing.limits("cpu", seconds=0.0)
    assert found.bytes_per_s > 1e8 and found.flops_per_s > 1e8
    assert drawn == [(2**22,), (1024, 1024), (1024, 1024)]


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.empty(10**6)
        second = torch.empty(10**6)
        del first
        third = torch.empty(3 * 10**6)
        del second, third

    assert timing.peak_bytes(call, "cpu") == pytest.approx(16e6, rel=0.01)


def test_a_deadline_is_shared_out() -> None:
    now = [100.0]
    whole = Deadline(60.0, lambda: now[0])
    assert whole.left == 60 and whole.fits(59) and not whole.fits(60)
    now[0] = 130.0
    part = whole.part(0.5)
    assert (whole.spent, whole.left, part.left) == (30, 30, 15)
    now[0] = 150.0
    assert part.left == 0 and not part.fits() and whole.fits()
    now[0] = 200.0
    assert whole.left == 0 and whole.part(0.5).left == 0
    assert Deadline(60.0).part(0.5, keep=40.0).seconds == pytest.approx(10, abs=0.1)
    assert Deadline(60.0).part(0.5, keep=90.0).seconds == 0
