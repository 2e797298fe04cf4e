"""Times of the steps of one decode, and the bytes that they must read.

A step is what happens between two marks: on a GPU between two CUDA events on the stream that the steps run on, so
whatever keeps the device waiting is in it; elsewhere between two readings of the clock.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from retinar.engine.config import GPTConfig
from retinar.kernels.spec import ALL_SPECS

DECODE_STEP = next(spec for spec in ALL_SPECS if spec.name == "decode_step")


class Steps(NamedTuple):
    """``seconds`` of consecutive steps, the first of which reads the token at position ``first``.

    ``whole``: seconds from the first submission to the last code, where whole images were made.
    """

    seconds: list[float]
    first: int = 0
    whole: float | None = None


class StepClock:
    """Marks in the stream of the work. ``mark`` costs the host microseconds and never waits."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """The end of a step, and the start of the next."""
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between consecutive marks; waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [one.elapsed_time(two) / 1e3 for one, two in itertools.pairwise(self._marks)]
        return [two - one for one, two in itertools.pairwise(self._marks)]


def timed_steps(step: Callable[[], object], count: int, device: str, *, warm_up: int = 2) -> list[float]:
    """Seconds of ``count`` calls of ``step``, after some that are not counted."""
    for _ in range(warm_up):
        step()
    clock = StepClock(device)
    clock.mark()
    for _ in range(count):
        step()
        clock.mark()
    return clock.seconds()


def percentile(seconds: Sequence[float], percent: float) -> float:
    """The smallest of them that at least so many per cent of them do not exceed."""
    return sorted(seconds)[max(0, math.ceil(percent / 100 * len(seconds)) - 1)]


def case_of(config: GPTConfig, images: int) -> dict[str, int]:
    """A case of decode_step's spec."""
    return {
        "images": images,
        "layers": config.n_layer,
        "heads": config.n_head,
        "groups": config.kv_heads,
        "dim": config.head_dim,
        "hidden": config.ffn_hidden,
        "vocabulary": config.vocab_size,
        "page": 1,
    }


def step_bytes(config: GPTConfig, images: int, position: int, size: int) -> int:
    """What a step of guided images at one position must read: the weights once, each row's cache once.

    From decode_step's spec, whose first image is at position 0: what it adds to the weights is one slot of its pair.
    """
    weights, one_slot = (DECODE_STEP.bytes(case_of(config, count), size) for count in (0, 1))
    return weights + images * (position + 1) * (one_slot - weights)


def decode_bytes(config: GPTConfig, images: int, first: int, count: int, size: int) -> int:
    """`step_bytes` summed over ``count`` steps from position ``first``."""
    return sum(step_bytes(config, images, position, size) for position in range(first, first + count))


def row(
    steps: Steps, config: GPTConfig, images: int, dtype: torch.dtype, bytes_per_s: float, **more: object
) -> dict[str, object]:
    """A line of a result. ``share``: the bytes that the measured steps must read, over the time that they took, over
    ``bytes_per_s``, what a copy in the same run reads and writes.

    Where only a window of steps was measured, ``extrapolated`` is true and ``seconds`` the mean step times all codes.
    """
    count, total = len(steps.seconds), sum(steps.seconds)
    moved = decode_bytes(config, images, steps.first, count, dtype.itemsize)
    whole = steps.whole if steps.whole is not None else total / count * config.block_size
    return {
        "name": "sampling",
        "direction": "forward",
        "images": images,
        "codes": config.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": whole,
        "images_per_s": images / whole,
        "extrapolated": steps.whole is None,
        "steps": count,
        "positions": [steps.first, steps.first + count],
        "step_p50": percentile(steps.seconds, 50),
        "step_p99": percentile(steps.seconds, 99),
        "step_mean": total / count,
        "bytes": moved,
        "bytes_per_s": moved / total,
        "share": moved / total / bytes_per_s,
        **more,
    }
