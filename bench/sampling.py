"""Sampling as a whole, and what it is compared with: latency of a step, images a second, bytes read over time.

Everything here is a row of its own, the most important first; what does not fit into the time that is left is named. A
baseline that fails is absent with its reason; ours that fails is wrong.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retinar.bench import sampling_baselines, sampling_images, trace
from retinar.bench.checks import first_line
from retinar.bench.deadline import Deadline
from retinar.bench.sampling_sizes import CFG_SCALE, INVARIANT, OURS, SIZES, Size, make_gpt
from retinar.bench.steps import StepClock, Steps, decode_bytes, row
from retinar.bench.timing import Limits
from retinar.bench.windows import middle
from retinar.engine.errors import InputError
from retinar.engine.graphs import FEW_ROWS, GraphRunner
from retinar.engine.request import Request, SamplingParams
from retinar.engine.runner import DecodeLoop
from retinar.engine.sampler import Sampler
from retinar.engine.scheduler import pages_needed
from retinar.kernels import ops

START_SECONDS = 10
"""Of a measurement on a GPU: a cache, graphs, kernels that are not compiled yet."""
SLOWER = 3
"""How much slower than the bound a measurement is taken to be when it is asked whether it still fits."""
WARM_UP = {"cuda": 3, "cpu": 1}
"""Steps that are not counted."""


class Job(NamedTuple):
    """One measurement. ``seconds``: what it is taken to need; ``baseline``: whether it is not ours."""

    name: str
    images: int
    seconds: float
    run: Callable[[], None]
    baseline: bool = False


@dataclass
class Sampling:
    """The phase of a run: ``jobs`` in turn, results in ``rows``, ``absent``, ``left_out`` and ``wrong``.

    ``path``: where the trace goes. ``upstream``: a checked clone, or None. ``unchecked``: why ours have no speed.
    """

    device: str
    size: Size
    limit: Limits
    deadline: Deadline
    path: Path
    exercise: bool = False
    upstream: Path | None = None
    unchecked: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[tuple[str, int], str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    step: dict[str, Any] | None = None
    lost: bool = False

    def run(self, changed: Callable[[], None] = lambda: None) -> None:
        """Everything; ``changed`` is called after each measurement."""
        self.gpt = make_gpt(self.size, self.device)
        late: list[str] = []
        for job in self.jobs():
            if self.lost:
                return
            if self.unchecked is not None and not job.baseline:
                self.absent[job.name, job.images] = self.unchecked
                continue
            if not self.deadline.fits(0.0 if self.exercise else job.seconds):
                late.append(_named(job.name, job.images))
                continue
            self._run(job)
            changed()
        sampling_baselines.upstream(self, late)
        if late:
            self.left_out.append(f"sampling, for lack of time: {', '.join(late)}")
        del self.gpt
        self.free()

    def jobs(self) -> Iterator[Job]:
        """In order of importance; LlamaGen comes after them, in a process of its own."""
        for invariant, batches in ((False, self.size.batches), (True, self.size.invariant)):
            for images in batches:
                name = INVARIANT if invariant else OURS
                yield Job(name, images, self.guess(images), lambda i=images, v=invariant: self.ours(i, v))  # type: ignore[misc]
        yield from sampling_baselines.jobs(self)
        yield from sampling_images.jobs(self)

    def guess(self, images: int, times: int = 1) -> float:
        """Seconds that whole images are taken to need, made so many times."""
        config, size = self.size.config, self.size.dtype.itemsize
        moved = decode_bytes(config, images, 0, config.block_size, size)
        return START_SECONDS + SLOWER * times * moved / self.limit.bytes_per_s

    def _run(self, job: Job) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            job.run()
        except InputError as error:  # too little memory for the cache, said in a sentence
            self.absent[job.name, job.images] = first_line(error)
        except Exception as error:
            sentence = f"{type(error).__name__}: {first_line(error)}"
            if job.baseline or isinstance(error, torch.OutOfMemoryError):
                self.absent[job.name, job.images] = sentence
            else:
                traceback.print_exc()
                self.wrong.append(f"{_named(job.name, job.images)} could not be sampled: {sentence}")
            self._still_there(sentence)
        self.free()

    def _still_there(self, after: str) -> None:
        """An illegal access takes the device away from the whole process."""
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                self.lost = True
                self.wrong.append(f"the device was lost ({first_line(error)}) after: {after}; the rest was not sampled")

    def ours(self, images: int, batch_invariant: bool) -> None:
        """Whole images, all at once, from the first submission to the last code."""
        sampler = self.sampler(batch_invariant=batch_invariant)
        requests = self.requests(sampler, images)
        loop = self.loop(sampler, requests)
        steps = decode(loop, requests, self.device)
        name = INVARIANT if batch_invariant else OURS
        self.add(
            steps,
            images,
            backend=name,
            warm_up_seconds=getattr(loop.runner, "warm_up_seconds", None),
            graph_bytes=getattr(loop.runner, "graph_bytes", None),
            implementation=sampler.origin.implementation,
        )
        if images == self.size.traced and not batch_invariant:
            self.trace(loop, requests)

    def trace(self, loop: DecodeLoop, requests: Sequence[Request]) -> None:
        """One step of these at the mean position: where its time goes, and the trace itself."""
        tickets = [loop.submit(request) for request in requests]
        for _ in range(middle(self.size.config.block_size, 1)):
            loop.step()
        runner = loop.runner
        rows = 2 * len(requests)
        blas = isinstance(runner, GraphRunner) and not runner.batch_invariant and rows > FEW_ROWS
        found = trace.step_profile(loop.step, self.device, self.path, blas=blas)
        for ticket in tickets:
            loop.cancel(ticket)
        self.left_out += found.pop("left_out")
        self.wrong += found.pop("wrong")
        self.step = {"images": len(requests), "position": middle(self.size.config.block_size, 1), **found}

    def sampler(self, **options: Any) -> Sampler:
        """With this model; nothing is copied. The exercise takes what stands for a GPU's kernels, not the CPU's."""
        options = {"backend": ops.preferred("decode_step", self.device), **options}
        return Sampler(self.gpt, dtype=self.size.dtype, device=self.device, **options)

    def requests(self, sampler: Sampler, images: int) -> list[Request]:
        labels = [index % self.size.config.num_classes for index in range(images)]
        return sampler.requests(labels, SamplingParams(cfg_scale=CFG_SCALE))

    def loop(self, sampler: Sampler, requests: Sequence[Request]) -> DecodeLoop:
        """A warm loop with room for all of them at once; InputError where memory does not allow it."""
        page_size, images = self.size.page_size, len(requests)
        loop = sampler.loop(requests, max_images=images, page_size=page_size)
        needed = images * pages_needed(requests[0], self.size.config.block_size, page_size)
        if loop.runner.cache.pages < needed:
            raise InputError(
                f"Expected memory for the cache of {images} images at once ({needed} pages of {page_size}), found room "
                f"for {loop.runner.cache.pages}: use a GPU with more."
            )
        return loop

    def add(self, steps: Steps, images: int, *, baseline: bool = False, **more: object) -> None:
        """A line of the result."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        more = {"model": self.size.model, "baseline": baseline, "peak_bytes": peak, **more}
        self.rows.append(row(steps, self.size.config, images, self.size.dtype, self.limit.bytes_per_s, **more))

    def free(self) -> None:
        """What the last measurement held goes before the next one, or another process, takes its own."""
        gc.collect()
        if self.device == "cuda" and not self.lost:
            torch.cuda.empty_cache()

    def content(self) -> dict[str, Any]:
        """As a result file holds it."""
        config = self.size.config
        size = f"{config.n_layer} layers, width {config.dim}, {config.parameter_count / 1e6:.3g} M"
        absent = [
            {"name": "sampling", "backend": name, "images": images, "reason": reason}
            for (name, images), reason in self.absent.items()
        ]
        about = {"model": self.size.model, "size": size, "codes": config.block_size, "cfg_scale": CFG_SCALE}
        return {**about, "page_size": self.size.page_size, "rows": self.rows, "absent": absent, "step": self.step}


def decode(loop: DecodeLoop, requests: Sequence[Request], device: str) -> Steps:
    """The steps of these requests, submitted together, after a few that are not counted and cancelled."""
    tickets = [loop.submit(request) for request in requests]
    for _ in range(WARM_UP[device]):
        loop.step()
    for ticket in tickets:
        loop.cancel(ticket)
    if device == "cuda":
        torch.cuda.synchronize()
    clock = StepClock(device)
    began = time.perf_counter()
    clock.mark()
    for request in requests:
        loop.submit(request)
    done = []
    while loop.scheduler.busy:
        done += loop.step()
        clock.mark()
    for finished in done:
        finished.wait()
    whole = time.perf_counter() - began
    if len(done) != len(requests):
        raise RuntimeError(f"{len(requests)} images were asked for, {len(done)} came")
    return Steps(clock.seconds(), 0, whole)


def _named(name: str, images: int) -> str:
    return f"{name} ({images} image{'s' * (images > 1)})"


def size_of(device: str, exercise: bool) -> Size:
    """What is measured on a device."""
    return SIZES["exercise" if exercise else device]
