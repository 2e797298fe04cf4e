"""How fast a run trains, and what it holds: tokens a second, MFU, peak memory, time spent waiting for data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from retinar.train.config import Precision

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

METERS = ("tokens_per_s", "mfu", "peak_memory_bytes", "data_wait", "matmul_flops_per_s")
"""Names in the log. Like the seconds of a step they differ from run to run; nothing that is trained depends on them."""
SIDE = {"cuda": 8192, "cpu": 512}
"""Of the product whose rate is measured. A CPU reaches its rate at 512, in a millisecond: short enough that one of some
hundred is not interrupted, also on a machine that others use."""
RATE_SECONDS = 0.4


class Meters:
    """Made at the start of a session; gives the meters' part of a line whenever the log gets one.

    ``tokens_per_step``: codes that one optimizer step trains on, over all processes. ``flops_per_step``: of that step,
    over all processes (see `flops`): a number, or a function of the step, counted from 0. ``peak_flops``: what matrix
    products reach, in FLOP/s, on all processes' devices together (see `matmul_flops_per_s`). ``done``: steps done
    before this session. ``unit``: what ``tokens_per_step`` counts where that is not tokens: the name in the log, as in
    "images_per_s". Starting resets CUDA's own peak of memory.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_step: float | Callable[[int], float],
        device: torch.device,
        peak_flops: float,
        *,
        done: int = 0,
        unit: str = "tokens",
    ) -> None:
        self.unit = unit
        self.tokens_per_step, self.device, self.peak_flops, self.done = tokens_per_step, device, peak_flops, done
        self._flops: Callable[[int], float] = flops_per_step if callable(flops_per_step) else lambda _: flops_per_step
        self._flops(done)  # counting a tokenizer's takes a second: now, not on the clock
        self._waited = 0.0
        self._first = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around the loading of a batch, up to the copy to the device."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def line(self, seconds: float, steps: int) -> dict[str, float]:
        """The values since the line before: ``steps`` optimizer steps (at least 1) that took ``seconds`` by the clock,
        evaluations and checkpoints left out. On a GPU read the loss before the clock: a step that is only queued has
        taken no time yet.

        tokens_per_s: of all processes. mfu (model FLOPs utilisation): the steps' FLOPs over ``seconds`` over
        ``peak_flops``; a share of what plain matrix products reach here, not of a data sheet. peak_memory_bytes: of
        this process; on CUDA the most that torch's tensors held since the line before, on a CPU the most that
        the process ever held (missing on Windows). data_wait: the share of ``seconds`` that this process spent inside
        `data`; on a GPU some of that may have passed while it was still busy. A session's first line also has
        matmul_flops_per_s, the ``peak_flops`` that mfu was taken of.
        """
        flops = sum(self._flops(step) for step in range(self.done, self.done + steps))
        found = {f"{self.unit}_per_s": self.tokens_per_step * steps / seconds, "mfu": flops / seconds / self.peak_flops}
        if (peak := peak_memory_bytes(self.device)) is not None:
            found["peak_memory_bytes"] = float(peak)
        found["data_wait"] = self._waited / seconds
        if self._first:
            found["matmul_flops_per_s"] = self.peak_flops
        self.done += steps
        self._waited, self._first = 0.0, False
        return found


def peak_memory_bytes(device: torch.device) -> int | None:
    """CUDA: the most that torch's tensors on ``device`` held since the last call, or since the peak was last reset.
    CPU: the most that this process ever held (its resident set); None where the system does not say."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if resource is None:
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def matmul_flops_per_s(device: torch.device, precision: Precision, *, side: int | None = None) -> float:
    """FLOP/s of the fastest of some square products of random numbers in bf16 or fp32: MFU's denominator.

    Takes about half a second, with torch's settings as they are (threads, TF32), and disturbs no random state. What
    it reaches is the most that products as large as a model's can hope for; on a shared machine it is as noisy as any
    time, and all processes of a machine must measure at the same time, as they train.
    """
    side = side or SIDE.get(device.type, 512)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    # Of zeros and ones a product is faster: they switch fewer transistors.
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = left @ right
    stop, fastest = time.perf_counter() + RATE_SECONDS, float("inf")
    while True:
        fastest = min(fastest, _seconds(left, right, out))
        if time.perf_counter() >= stop:
            return 2 * side**3 / fastest


def _seconds(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    """Of a product; on a GPU of ten that are queued together."""
    if left.device.type != "cuda":
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(left.device):
        start.record()
        for _ in range(10):
            torch.mm(left, right, out=out)
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3 / 10
