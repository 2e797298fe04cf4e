"""Fills Triton's cache before the first launches: every variant of this GPU, on all cores at once.

A launch compiles its variant on one core, and a few hundred of them would take most of a run's time. What is compiled
ahead of time is what a launch looks up (tests/bench/test_precompile.py).
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import NamedTuple

from retinar.bench.checks import first_line
from retinar.bench.deadline import Deadline
from retinar.kernels import aot

START_SECONDS = 10  # of a worker, mostly the import of torch


class Job(NamedTuple):
    """A variant by its kernel's name and its place in `aot.ordered`: the objects themselves cannot be sent."""

    kernel: str
    architecture: int
    place: int


def jobs(architecture: int, ops: Collection[str] | None = None) -> list[Job]:
    """Every variant of an architecture, of all ops or those of some folders, those of bf16 first."""
    found = [
        (not narrow, Job(kernel.name, architecture, place))
        for kernel in aot.kernels()
        if ops is None or kernel.op in ops
        for place, variant in enumerate(aot.ordered(kernel, architecture))
        for narrow in ["bf16" in variant.pointers]
    ]
    return [job for _, job in sorted(found, key=lambda each: each[0])]


def nearest(major: int, minor: int) -> int:
    """The entry of the kernels' tables for a compute capability."""
    return max((each for each in aot.ARCHITECTURES if each <= 10 * major + minor), default=aot.ARCHITECTURES[0])


def precompile(
    architecture: int, processes: int, deadline: Deadline, ops: Collection[str] | None = None
) -> dict[str, object]:
    """What was compiled and how long it took; "failed": sentences. What the deadline cuts off, launches compile."""
    wanted = jobs(architecture, ops)
    found: dict[str, object] = {"variants": len(wanted), "processes": processes}
    if not deadline.fits(START_SECONDS):
        return {**found, "compiled": 0, "seconds": 0.0, "failed": []}
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    futures: list[Future[str | None]] = [pool.submit(compile_job, job) for job in wanted]
    done, _ = wait(futures, timeout=deadline.left)
    pool.shutdown(wait=False, cancel_futures=True)
    failed = []
    for future in done:
        error = future.exception()
        sentence = future.result() if error is None else f"a compiling process ended: {first_line(error)}"
        if sentence is not None and sentence not in failed:
            failed.append(sentence)
    return {**found, "compiled": len(done) - len(failed), "seconds": deadline.spent, "failed": failed}


def compile_job(job: Job) -> str | None:
    """None, or why it does not compile."""
    kernel = _kernels()[job.kernel]
    variant = aot.ordered(kernel, job.architecture)[job.place]
    try:
        aot.compile_variant(kernel, variant)
    except Exception as error:
        return f"{kernel.name} {variant.name()}: {type(error).__name__}: {first_line(error)}"
    return None


@functools.cache
def _kernels() -> dict[str, aot.Kernel]:
    return {kernel.name: kernel for kernel in aot.kernels()}
