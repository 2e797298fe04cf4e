"""One whole run: correctness on the device, then times of what is right, then the profile of a training step.

Phases share one deadline; what does not fit is named and left out. A failure is a sentence, and the rest goes on. The
result is written after every phase, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from retinar.bench import baselines, checks_whole, machine, precompile, record, targets
from retinar.bench.baselines import Absent
from retinar.bench.cases import DTYPES, LEFT_OUT
from retinar.bench.checks import Trial, check, first_line, name_of, runnable
from retinar.bench.deadline import Deadline
from retinar.bench.ops import Measurement, dtype_of, specs, time_op
from retinar.bench.plan import plan
from retinar.bench.timing import Limits, limits
from retinar.bench.variants import op_of
from retinar.engine.progress import Progress, plain
from retinar.kernels import ops
from retinar.kernels.spec import Case, OpSpec

TYPES = (torch.bfloat16, torch.float32, torch.float16)
PRECOMPILE, CHECKS, TIMES = 0.2, 0.45, 0.55
"""Shares of the time that is left when a phase begins; a phase that ends early leaves the rest to the next."""
ENGINE_SECONDS = 30


@dataclasses.dataclass
class Run:
    """A run on ``device`` ("cuda", "cpu"); the exercise is the same at tiny sizes, whose times say nothing.

    ``wrong``: sentences, each a failure; ``left_out``: sentences on what was not done and why.
    """

    device: str
    out: Path
    deadline: Deadline
    exercise: bool = False
    seconds: float = 0.3
    only: str | None = None
    progress: Progress = plain
    path: Path | None = None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    limits: dict[torch.dtype, Limits] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    absent: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    checked: int = 0
    passed: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    lost: bool = False

    @property
    def size(self) -> str:
        return "exercise" if self.exercise else self.device

    def all(self) -> dict[str, Any]:
        """Every phase; the result's content. ``self.path`` is where it lies."""
        phases: list[Callable[[], None]] = [self.precompile, self.check, self.time, self.profile, self.engine]
        self.extra["began"] = record.now()
        for phase in phases:
            if not self.lost:
                try:
                    phase()
                except Exception as error:  # a phase's own mistake: the others still have their say
                    traceback.print_exc()
                    self.wrong.append(f"{phase.__name__}: {type(error).__name__}: {first_line(error)}")
            self.save()
        return self.content()

    def precompile(self) -> None:
        """Triton's binaries, on a GPU."""
        missing = self._triton()
        if missing is not None:
            self.left_out.append(f"our GPU kernels, {missing} (on a CPU they need triton and TRITON_INTERPRET=1)")
        elif self.device == "cuda":
            architecture = precompile.nearest(*torch.cuda.get_device_capability())
            found = precompile.precompile(architecture, machine.cores(), self.deadline.part(PRECOMPILE))
            self.wrong += found["failed"]  # type: ignore[arg-type]
            self.extra["precompiled"] = found

    def check(self) -> None:
        """All specs x cases x backends, the dtype that is timed first; then the checks of `checks_whole`."""
        deadline = self.deadline.part(CHECKS)
        timed = getattr(torch, DTYPES[self.size])
        late: list[str] = []
        failed: set[tuple[str, str]] = set()
        with self.progress(f"correctness on {self.device}", None) as bar:
            for dtype in sorted(TYPES, key=lambda each: each != timed):
                for spec in specs(self.only):
                    if dtype not in spec.dtypes or self.lost:
                        continue
                    for backend in runnable(spec, self.device, dtype):
                        cases = self._cases(spec, dtype)
                        done = self._check(spec, cases, dtype, backend, deadline, failed)
                        bar.advance(done, spec.name)
                        if done < len(cases):
                            late.append(f"{spec.name} {backend} {name_of(dtype)}")
                        elif dtype == dtype_of(spec, self.size):
                            self.passed.add((spec.name, backend))
        self.passed -= failed
        if late:
            self.left_out.append(f"not checked, or not in all cases, for lack of time: {', '.join(late)}")
        if not self.lost:
            self._check_whole(timed)

    def _check(
        self, spec: OpSpec, cases: Iterable[Case], dtype: torch.dtype, backend: str, deadline: Deadline,
        failed: set[tuple[str, str]],
    ) -> int:  # fmt: skip
        """How many cases were checked."""
        done = 0
        for case in cases:
            if not deadline.fits() or self.lost:
                break
            wrong = check(Trial(spec, case, dtype, backend, self.device))
            done += 1
            if wrong is not None:
                self.wrong.append(wrong)
                failed.add((spec.name, backend))
                self._still_there(wrong)
        self.checked += done
        return done

    def _cases(self, spec: OpSpec, dtype: torch.dtype) -> tuple[Case, ...]:
        """All; of the exercise the smallest but the first, which is of size one: two in the dtype that is timed."""
        if not self.exercise:
            return spec.cases
        return tuple(sorted(spec.cases[1:], key=spec.flops)[: 2 if dtype == dtype_of(spec, self.size) else 1])

    def _check_whole(self, dtype: torch.dtype) -> None:
        for job in checks_whole.jobs(self.device, dtype, self.only):
            if self.lost:
                return
            if isinstance(job, str):
                self.left_out.append(job)
                continue
            try:
                wrong = job()
            except Exception as error:
                wrong = f"{type(error).__name__}: {first_line(error)}"
            self.checked += 1
            if wrong is not None:
                self.wrong.append(wrong)
                self._still_there(wrong)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def time(self) -> None:
        """What passed, and the baselines, op by op."""
        deadline = self.deadline.part(TIMES)
        self.left_out += [
            f"{name}, {backend}: not timed, {reason}"
            for (size, name, backend), reason in LEFT_OUT.items()
            if size == self.size and (self.only is None or self.only in name)
        ]
        inputs: tuple[str, Any] = ("", None)
        late: list[str] = []
        with self.progress(f"times on {self.device}", None) as bar:
            for what in plan(self.device, self.size, self.only):
                if isinstance(what, Absent):
                    self.absent[what.name, what.baseline] = what.reason
                elif what.baseline or what.group in self.passed:
                    if not deadline.fits() or self.lost:
                        late.append(what.id)
                        continue
                    if what.spec.name != inputs[0]:
                        inputs = (what.spec.name, None)  # the old ones go before the new ones come
                        if self.device == "cuda":
                            torch.cuda.empty_cache()
                        inputs = (what.spec.name, what.inputs(2 if self.exercise else None))
                    self._time(what, inputs[1])
                    bar.advance(1, what.id)
                elif not any(each.startswith(what.spec.name) and what.name in each for each in self.wrong):
                    late.append(f"{what.id} (not checked)")
        if late:
            self.left_out.append(f"not timed for lack of time: {', '.join(late)}")

    def _time(self, what: Measurement, inputs: Any) -> None:
        if (what.spec.name, what.name) in self.absent:
            return
        try:
            if what.dtype not in self.limits:
                self.limits[what.dtype] = limits(self.device, what.dtype, seconds=self.seconds)
            if what.baseline and what.direction == "forward":
                differs = baselines.disagrees(what, inputs[0])
                if differs is not None:
                    self.absent[what.spec.name, what.name] = differs
                    return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of torch, about kernels that it does not take
                self.rows.append(
                    time_op(what, self.limits[what.dtype], inputs, self.seconds, 1 if self.exercise else 5)
                )
        except Exception as error:
            sentence = f"{type(error).__name__}: {first_line(error)}"
            if what.baseline:
                self.absent[what.spec.name, what.name] = sentence
            else:
                self.wrong.append(f"{what.spec.name} ({what.direction}, {what.name}) could not be timed: {sentence}")
            self._still_there(sentence)

    def profile(self) -> None:
        """The default training step, where our kernels run."""
        if self.only is not None:
            return
        reason = self._triton()
        if reason is not None:
            self.left_out.append("the profile of a training step: our GPU kernels do not run here")
            return
        from retinar.bench.profile_step import profile_step  # it imports Triton's kernels

        found = profile_step(self.device, self.deadline)
        self.wrong += found.pop("wrong")
        self.extra["profile"] = found

    def engine(self) -> None:
        """The engine as a whole, in what time is left."""
        if self.only is not None:
            return
        if not self.exercise and not self.deadline.fits(ENGINE_SECONDS):
            self.left_out.append("the engine as a whole: no time was left")
            return
        try:
            from retinar.bench.engine import engine_rows
        except ModuleNotFoundError as error:
            self.left_out.append(f"the engine as a whole: it needs the package {error.name}, which is not installed")
            return
        self.rows += engine_rows(self.device, self.size, self.seconds)

    def _triton(self) -> str | None:
        """None where our GPU kernels run in this process, else why they do not."""
        found = [ops.backends(op_of(spec)) for spec in specs()]
        reasons = [each["triton"] for each in found if "triton" in each]
        return None if None in reasons else reasons[0] if reasons else "no op has a GPU kernel"

    def _still_there(self, after: str) -> None:
        """An illegal access takes the device away from the whole process: then nothing after it means anything."""
        if self.device == "cuda" and not self.lost:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                self.lost = True
                self.wrong.append(f"the device was lost ({first_line(error)}) after: {after}; the rest was not run")

    def content(self) -> dict[str, Any]:
        """The result so far."""
        named = {name_of(dtype): limit for dtype, limit in self.limits.items()}
        tests = {"checked": self.checked, "failed": self.wrong, "passed": not self.wrong, "by": "bench.checks"}
        absent = [{"name": op, "baseline": each, "reason": why} for (op, each), why in self.absent.items()]
        content = record.document(self.device, self.rows, named, tests)
        content |= {"exercise": self.exercise, "date": self.extra.get("began", content["date"])}
        content |= {"absent": absent, "left_out": self.left_out, "minutes": self.deadline.spent / 60}
        content |= {key: value for key, value in self.extra.items() if key != "began"}
        return content | {"targets": targets.evaluate(content)}

    def save(self) -> None:
        self.path = record.save(self.out, self.content())
