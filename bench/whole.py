"""One whole run: correctness on the device, times of what is right, the profile of a training step, sampling.

Phases share one deadline; what does not fit is named and left out. A failure is a sentence, and the rest goes on. The
result is written after every phase, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retinar.bench import check_phase, machine, precompile, record, targets
from retinar.bench.baselines import kernels as baselines
from retinar.bench.baselines.kernels import Absent
from retinar.bench.cases import LEFT_OUT
from retinar.bench.check_phase import SAMPLING
from retinar.bench.checks import first_line, name_of
from retinar.bench.deadline import Deadline
from retinar.bench.ops import Measurement, specs, time_op
from retinar.bench.plan import plan
from retinar.bench.profile import GROUP_OF_DECODING
from retinar.bench.timing import Limits, limits
from retinar.bench.variants import op_of
from retinar.engine.progress import Progress, plain
from retinar.kernels import ops

PRECOMPILE, CHECKS, TIMES = 0.2, 0.45, 0.55
"""Shares of the time that is left when a phase begins; a phase that ends early leaves the rest to the next."""
ENGINE_SECONDS = 30
SAMPLING_SECONDS = {"cuda": 150.0, "exercise": 40.0}
"""Kept for it, the last phase, by those before it."""


@dataclasses.dataclass
class Run:
    """A run on ``device`` ("cuda", "cpu"); the exercise is the same at tiny sizes, whose times say nothing.

    ``only``: specs whose name contains this, or "sampling". ``upstream``: a checked clone of LlamaGen. ``wrong``:
    sentences, each a failure; ``left_out``: sentences on what was not done and why.
    """

    device: str
    out: Path
    deadline: Deadline
    exercise: bool = False
    seconds: float = 0.3
    only: str | None = None
    upstream: Path | None = None
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

    @property
    def kept(self) -> float:
        """Seconds that the phases before sampling leave to it."""
        return SAMPLING_SECONDS.get(self.size, 0.0) if self.only is None else 0.0

    def all(self) -> dict[str, Any]:
        """Every phase; the result's content. ``self.path`` is where it lies."""
        phases: list[Callable[[], None]] = [self.precompile, self.check, self.time, self.profile, self.engine]
        phases.append(self.sampling)
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
            chosen = GROUP_OF_DECODING if self.only == SAMPLING else None
            deadline = self.deadline.part(PRECOMPILE, self.kept)
            found = precompile.precompile(architecture, machine.cores(), deadline, chosen)
            self.wrong += found["failed"]  # type: ignore[arg-type]
            self.extra["precompiled"] = found

    def check(self) -> None:
        """All specs x cases x backends, and the checks of `checks_whole`."""
        check_phase.check(self, self.deadline.part(CHECKS, self.kept))

    def time(self) -> None:
        """What passed, and the baselines, op by op."""
        deadline = self.deadline.part(TIMES, self.kept)
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
            if what.baseline and what.direction == "forward":
                differs = baselines.disagrees(what, inputs[0])
                if differs is not None:
                    self.absent[what.spec.name, what.name] = differs
                    return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of torch, about kernels that it does not take
                limit = self.limit(what.dtype)
                self.rows.append(time_op(what, limit, inputs, self.seconds, 1 if self.exercise else 5))
        except Exception as error:
            sentence = f"{type(error).__name__}: {first_line(error)}"
            if what.baseline:
                self.absent[what.spec.name, what.name] = sentence
            else:
                self.wrong.append(f"{what.spec.name} ({what.direction}, {what.name}) could not be timed: {sentence}")
            self.still_there(sentence)

    def profile(self) -> None:
        """The default training step, where our kernels run."""
        if self.only is not None:
            return
        reason = self._triton()
        if reason is not None:
            self.left_out.append("the profile of a training step: our GPU kernels do not run here")
            return
        from retinar.bench.profile_step import profile_step  # it imports Triton's kernels

        found = profile_step(self.device, self.deadline.part(1.0, self.kept))
        self.wrong += found.pop("wrong")
        self.extra["profile"] = found

    def engine(self) -> None:
        """The engine as a whole, in what time is left."""
        if self.only is not None:
            return
        if not self.exercise and not self.deadline.fits(ENGINE_SECONDS + self.kept):
            self.left_out.append("the engine as a whole: no time was left")
            return
        try:
            from retinar.bench.engine import engine_rows
        except ModuleNotFoundError as error:
            self.left_out.append(f"the engine as a whole: it needs the package {error.name}, which is not installed")
            return
        self.rows += engine_rows(self.device, self.size, self.seconds)

    def sampling(self) -> None:
        """Whole images of the paper's model, ours and the baselines', and the trace of a step."""
        if self.only not in (None, SAMPLING):
            return
        try:
            from retinar.bench.sampling import Sampling, size_of
        except ModuleNotFoundError as error:
            self.left_out.append(f"sampling: it needs the package {error.name}, which is not installed")
            return
        size = size_of(self.device, self.exercise)
        path = record.path_of(self.out, self.content())
        path = path.with_name(f"{path.stem}-step.json.gz")
        limit = self.limit(size.dtype)
        unchecked = check_phase.unchecked(self.passed, self.device, size.dtype)
        found = Sampling(
            self.device, size, limit, self.deadline, path, self.exercise, upstream=self.upstream, unchecked=unchecked
        )

        def changed() -> None:
            self.extra[SAMPLING] = found.content()
            self.save()

        try:
            found.run(changed)
        finally:
            self.wrong += found.wrong
            self.left_out += found.left_out
            changed()

    def limit(self, dtype: torch.dtype) -> Limits:
        """Of this device in a dtype, measured when first asked for."""
        if dtype not in self.limits:
            self.limits[dtype] = limits(self.device, dtype, seconds=self.seconds)
        return self.limits[dtype]

    def _triton(self) -> str | None:
        """None where our GPU kernels run in this process, else why they do not."""
        found = [ops.backends(op_of(spec)) for spec in specs()]
        reasons = [each["triton"] for each in found if "triton" in each]
        return None if None in reasons else reasons[0] if reasons else "no op has a GPU kernel"

    def still_there(self, after: str) -> None:
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
        content |= {"exercise": self.exercise, "only": self.only, "date": self.extra.get("began", content["date"])}
        content |= {"absent": absent, "left_out": self.left_out, "minutes": self.deadline.spent / 60}
        content |= {key: value for key, value in self.extra.items() if key != "began"}
        return content | {"targets": targets.evaluate(content)}

    def save(self) -> None:
        self.path = record.save(self.out, self.content())
