"""The cases of decoding on a CPU in turn: what is compiled, checked, timed and held against the machine's limit."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retinar.bench import roofline
from retinar.bench.baselines import gguf_model, llama_cpp
from retinar.bench.checks import first_line
from retinar.bench.deadline import Deadline
from retinar.bench.decoding_rows import NAME, named, result_row, said, words
from retinar.bench.decoding_sizes import (
    COMPILED,
    EAGER,
    INT8,
    INT8_CACHE,
    LLAMA_CPP,
    OURS,
    Case,
    DecodingSize,
)
from retinar.bench.decoding_steps import ModelSteps, Step, timed
from retinar.bench.plan import forget_compiled
from retinar.bench.sampling_sizes import CFG_SCALE

TOLERANCE = {OURS: 0.1, INT8: 0.7, INT8_CACHE: 0.7}
"""Of the norm of the logits of plain torch: a gross error has no speed (unrelated logits are 1.4 apart). The tests have
the budgets; of random weights 36 layers make 0.05 in bf16 and 0.4 in int8."""
Say = Callable[[str], None]


class Row(NamedTuple):
    """Something of ours, or of plain torch, to measure."""

    backend: str
    make: Callable[[], Step]
    weights: torch.dtype
    cache: torch.dtype
    baseline: bool = False
    compile_seconds: float | None = None


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@dataclass
class Decoding:
    """The cases in turn; results in ``rows``, ``absent``, ``left_out`` and ``wrong``.

    ``program``: llama.cpp's, checked; it takes only time that no later case needs.
    """

    size: DecodingSize
    deadline: Deadline
    exercise: bool = False
    say: Say = to_stderr
    program: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    model: ModelSteps | None = None
    peer: llama_cpp.LlamaCpp | None = None

    @torch.no_grad()
    def run(self) -> None:
        """Everything that fits into the time."""
        self.threads = torch.get_num_threads()
        self.read = roofline.ReadLoop(self.size.read_bytes)
        name = None
        try:
            for index, case in enumerate(self.size.cases):
                self.kept = sum(later.seconds for later in self.size.cases[index + 1 :])
                if not self._fits(case):
                    self.left_out.append(f"{NAME} of {named(case)}, for lack of time")
                    continue
                if case.model != name:
                    name = case.model
                    self._unload()
                    self.model = self._load(case)
                assert self.model is not None
                self._case(case, self.model)
        finally:
            self._unload()

    def content(self) -> dict[str, Any]:
        """As a result file holds it."""
        about = {"context": self.size.context, "page_size": self.size.page_size, "cfg_scale": CFG_SCALE}
        read = f"torch sums {self.size.read_bytes >> 20} MiB of fp32, {self.threads} threads"
        peer = {} if self.program is None else {"llama_cpp": llama_cpp.version(self.program) or "of no stated version"}
        return {**about, "read": read, **peer, "rows": self.rows, "absent": self.absent}

    def _fits(self, case: Case) -> bool:
        return self.exercise or self.deadline.fits(case.seconds)

    def _load(self, case: Case) -> ModelSteps:
        """A model's weights, plain and packed: the rows of one case come closely after each other."""
        config = self.size.config(case)
        self.say(f"{case.model}: random weights, {config.parameter_count / 1e6:.0f} M, plain and packed")
        model = ModelSteps(self.size, case, self.threads, exercise=self.exercise)
        if self.program is not None:
            self.peer = llama_cpp.LlamaCpp(self.program, model.weights, config, self.threads)
        return model

    def _unload(self) -> None:
        if self.peer is not None:
            self.peer.close()
        self.model = self.peer = None
        forget_compiled()
        gc.collect()  # what a compiler holds goes in circles

    def _case(self, case: Case, model: ModelSteps) -> None:
        """Compile, then measure row by row, the bandwidth before and after each."""
        forget_compiled()
        gc.collect()
        model.start(case.images)
        self.say(f"{named(case)}: compiling and measuring")
        self.expected: Tensor | None = None
        for row in list(self._rows(case, model)):  # all are compiled before the first is measured
            if isinstance(row, str):
                self._peer(case, row)
                continue
            try:
                self._row(case, row, model)
            except Exception as error:
                sentence = f"{type(error).__name__}: {first_line(error)}"
                if row.baseline or isinstance(error, torch.OutOfMemoryError):
                    self._miss(case, row.backend, sentence)
                else:
                    self.wrong.append(f"{named(case)}, {row.backend}: {sentence}")

    def _rows(self, case: Case, model: ModelSteps) -> Iterator[Row | str]:
        """In the order of measuring; of llama.cpp the kind of weights, next to ours of that width."""
        plain, int8 = self.size.dtype, torch.int8
        yield Row(EAGER, model.eager, plain, plain, True)
        for name in COMPILED:
            made = self._compiled(case, name, model)
            if made is not None:
                yield Row(name, lambda made=made: made[0], plain, plain, True, made[1])  # type: ignore[misc]
        ours = ((OURS, plain, plain, gguf_model.BF16), (INT8, int8, plain, gguf_model.Q8_0))
        for name, weights, cache, kind in (*ours, (INT8_CACHE, int8, int8, None)):
            if model.native_missing is not None:
                self._miss(case, name, model.native_missing)
            else:
                make = lambda weights=weights, cache=cache: model.ours(weights, cache)  # noqa: E731
                yield Row(name, make, weights, cache)
            if self.peer is not None and kind is not None:
                yield kind

    def _compiled(self, case: Case, name: str, model: ModelSteps) -> tuple[Step, float] | None:
        """(a step, seconds of compiling it), or None with the reason in ``absent``."""
        if not self._fits(case):
            self._miss(case, name, "there was no time to compile it")
            return None
        try:
            made = model.compiled(name)
        except Exception as error:
            self._miss(case, name, f"{type(error).__name__}: {first_line(error)}")
            return None
        self.say(f"  {name}: compiled in {made[1]:.0f} s")
        return made

    def _row(self, case: Case, row: Row, model: ModelSteps) -> None:
        """Check, time, and hold against the limit that the bandwidth before and after gives."""
        step = row.make()
        logits_BV = step()
        if self.expected is None:
            self.expected = logits_BV.clone()
        error = float((logits_BV - self.expected).norm() / self.expected.norm())
        if not error <= TOLERANCE.get(row.backend, 0.1):
            sentence = f"its logits differ from plain torch's by {error:.2g} of their norm"
            if row.baseline:
                self._miss(case, row.backend, sentence)
            else:
                self.wrong.append(f"{named(case)}, {row.backend}: {sentence}")
            return
        before = self._machine(row.weights)
        seconds = timed(step, self.size, self.size.seconds)
        rates = before, self._machine(row.weights)
        work = roofline.work_of(model.config, case.images, self.size.context, row.weights, row.cache)
        about = {"baseline": row.baseline, "weights": words(row.weights), "cache": words(row.cache), "error": error}
        about["compile_seconds"] = row.compile_seconds
        where = {} if row.baseline else model.where(row.weights, row.cache)
        self._add(case, row.backend, seconds, rates, work, {**about, **where})

    def _peer(self, case: Case, kind: str) -> None:
        """llama.cpp's row of a kind of weights."""
        assert self.peer is not None
        weights = torch.int8 if kind == gguf_model.Q8_0 else self.size.dtype
        left = case.seconds if self.exercise else min(case.seconds, self.deadline.left - self.kept)
        before = self._machine(weights)
        try:
            found = self.peer.measure(kind, 2 * case.images, self.size.context, left)
        except Exception as error:
            told = isinstance(error, llama_cpp.Failed)
            self._miss(case, LLAMA_CPP[kind], str(error) if told else f"{type(error).__name__}: {first_line(error)}")
            return
        rates = before, self._machine(weights)
        work = llama_cpp.work_of(self.peer.config, case.images, self.size.context, kind)
        about = {"baseline": True, "weights": kind, "cache": llama_cpp.DTYPES[found.way.cache], "error": None}
        about |= {"compile_seconds": None, "flash_attention": found.way.flash == "on"}
        about["steps"] = len(found.seconds) * llama_cpp.steps_of(self.size.context)
        self._add(case, LLAMA_CPP[kind], found.seconds, rates, work, about)

    def _add(
        self,
        case: Case,
        backend: str,
        seconds: Sequence[float],
        rates: Sequence[roofline.Rates],
        work: roofline.Work,
        about: dict[str, Any],
    ) -> None:
        self.rows.append(result_row(case, backend, self.size.config(case), seconds, rates, work, about))
        self.say(f"  {said(self.rows[-1], rates)}")

    def _machine(self, weights: torch.dtype) -> roofline.Rates:
        """What this machine allows now."""
        return roofline.Rates(self.read.bytes_per_s(), roofline.product_rate(self.size.side, weights))

    def _miss(self, case: Case, backend: str, reason: str) -> None:
        self.absent.append({"model": case.model, "images": case.images, "backend": backend, "reason": reason})
        self.say(f"  {backend}: absent, {reason}")
