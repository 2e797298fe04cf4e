"""The first phase of a whole run: is every op right on this device? What is not has no time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import torch

from retinar.bench import checks_decoding, checks_whole
from retinar.bench.cases import DTYPES
from retinar.bench.checks import Trial, first_line, name_of, runnable
from retinar.bench.checks import check as check_trial
from retinar.bench.deadline import Deadline
from retinar.bench.ops import dtype_of, specs
from retinar.bench.steps import DECODE_STEP
from retinar.kernels.spec import Case, OpSpec

if TYPE_CHECKING:
    from retinar.bench.whole import Run

TYPES = (torch.bfloat16, torch.float32, torch.float16)


SAMPLING = "sampling"
"""What ``only`` is for sampling alone."""
SAMPLED = ("linear", "paged_attention", "cfg_sample", "decode_step")
"""The specs that have to be right for a speed of sampling: what a step is made of, and the step."""
REPLAY = ("graphs", "triton")
"""In ``passed``: the runner's graphs draw the codes that they should (`checks_decoding`)."""


def chosen(only: str | None) -> list[OpSpec]:
    """The specs that are checked."""
    return [spec for spec in specs() if spec.name in SAMPLED] if only == SAMPLING else specs(only)


def unchecked(passed: Collection[tuple[str, str]], device: str, dtype: torch.dtype) -> str | None:
    """Why no speed of sampling is reported: what a step is made of was not found right on this device. None: it was."""
    needed = [(spec.name, each) for spec in chosen(SAMPLING) for each in runnable(spec, device, dtype)]
    needed += [REPLAY] if ("decode_step", "triton") in needed else []
    missing = [f"{name} ({backend})" for name, backend in needed if (name, backend) not in passed]
    return f"wrong on this device, or not checked: {', '.join(missing)}" if missing else None


def check(run: Run, deadline: Deadline) -> None:
    """All specs x cases x backends, the dtype that is timed first; then the checks of `checks_whole`."""
    timed = getattr(torch, DTYPES[run.size])
    late: list[str] = []
    failed: set[tuple[str, str]] = set()
    with run.progress(f"correctness on {run.device}", None) as bar:
        for dtype in [timed] if run.only == SAMPLING else sorted(TYPES, key=lambda each: each != timed):
            for spec in chosen(run.only):
                if dtype not in spec.dtypes or run.lost:
                    continue
                for backend in runnable(spec, run.device, dtype):
                    cases = _cases(run, spec, dtype)
                    done = _check(run, spec, cases, dtype, backend, deadline, failed)
                    bar.advance(done, spec.name)
                    if done < len(cases):
                        late.append(f"{spec.name} {backend} {name_of(dtype)}")
                    elif dtype == dtype_of(spec, run.size):
                        run.passed.add((spec.name, backend))
    run.passed -= failed
    if late:
        run.left_out.append(f"not checked, or not in all cases, for lack of time: {', '.join(late)}")
    if not run.lost:
        _check_whole(run, timed)


def _check(
    run: Run, spec: OpSpec, cases: Iterable[Case], dtype: torch.dtype, backend: str, deadline: Deadline,
    failed: set[tuple[str, str]],
) -> int:  # fmt: skip
    """How many cases were checked."""
    done = 0
    for case in cases:
        if not deadline.fits() or run.lost:
            break
        wrong = check_trial(Trial(spec, case, dtype, backend, run.device))
        done += 1
        if wrong is not None:
            run.wrong.append(wrong)
            failed.add((spec.name, backend))
            run.still_there(wrong)
    run.checked += done
    return done


def _cases(run: Run, spec: OpSpec, dtype: torch.dtype) -> tuple[Case, ...]:
    """All; of the exercise the smallest but the first, which is of size one: two in the dtype that is timed."""
    if not run.exercise:
        return spec.cases + (spec.device_cases if run.device == "cuda" else ())
    return tuple(sorted(spec.cases[1:], key=spec.flops)[: 2 if dtype == dtype_of(spec, run.size) else 1])


def _check_whole(run: Run, dtype: torch.dtype) -> None:
    if run.only in (None, SAMPLING) and "triton" in runnable(DECODE_STEP, run.device, dtype):
        right = [_job(run, job) for job in checks_decoding.jobs(run.device, dtype)]
        if all(right):
            run.passed.add(REPLAY)
    for job in checks_whole.jobs(run.device, dtype, run.only):
        if isinstance(job, str):
            run.left_out.append(job)
        else:
            _job(run, job)


def _job(run: Run, job: Callable[[], str | None]) -> bool:
    """Whether a check found nothing wrong."""
    if run.lost:
        return False
    try:
        wrong = job()
    except Exception as error:
        wrong = f"{type(error).__name__}: {first_line(error)}"
    run.checked += 1
    if wrong is not None:
        run.wrong.append(wrong)
        run.still_there(wrong)
    if run.device == "cuda" and not run.lost:
        torch.cuda.empty_cache()
    return wrong is None
