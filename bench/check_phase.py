"""The first phase of a whole run: is every op right on this device? What is not has no time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch

from retinar.bench import checks_whole
from retinar.bench.cases import DTYPES
from retinar.bench.checks import Trial, first_line, name_of, runnable
from retinar.bench.checks import check as check_trial
from retinar.bench.deadline import Deadline
from retinar.bench.ops import dtype_of, specs
from retinar.kernels.spec import Case, OpSpec

if TYPE_CHECKING:
    from retinar.bench.whole import Run

TYPES = (torch.bfloat16, torch.float32, torch.float16)


SAMPLING = "sampling"
"""What ``only`` is for sampling alone."""
SAMPLED = ("decode_step", "cfg_sample")
"""The specs that have to be right for a speed of sampling: all that a step is made of is in them."""


def chosen(only: str | None) -> list[OpSpec]:
    """The specs that are checked."""
    return [spec for spec in specs() if spec.name in SAMPLED] if only == SAMPLING else specs(only)


def unchecked(passed: Collection[tuple[str, str]], device: str, dtype: torch.dtype) -> str | None:
    """Why no speed of sampling is reported: what a step is made of was not found right on this device. None: it was."""
    needed = [(spec.name, each) for spec in chosen(SAMPLING) for each in runnable(spec, device, dtype)]
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
        return spec.cases
    return tuple(sorted(spec.cases[1:], key=spec.flops)[: 2 if dtype == dtype_of(spec, run.size) else 1])


def _check_whole(run: Run, dtype: torch.dtype) -> None:
    for job in checks_whole.jobs(run.device, dtype, run.only):
        if run.lost:
            return
        if isinstance(job, str):
            run.left_out.append(job)
            continue
        try:
            wrong = job()
        except Exception as error:
            wrong = f"{type(error).__name__}: {first_line(error)}"
        run.checked += 1
        if wrong is not None:
            run.wrong.append(wrong)
            run.still_there(wrong)
        if run.device == "cuda":
            torch.cuda.empty_cache()
