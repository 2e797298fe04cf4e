"""Decoding on a CPU at real size, beside what plain torch reaches and what this machine allows:
``python -m retinar.bench.decoding``, or ``retinar bench --only decoding``; ``make bench`` has it too.

Random bf16 weights, guided images, every row at one position, the whole step with the draw. The rows of a case follow
each other closely, once everything is compiled and packed, and the bandwidth is read between them: on a shared machine
only what was measured together can be compared.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retinar.bench import record, roofline, targets_decoding
from retinar.bench.baselines import static_cache
from retinar.bench.baselines.eager_step import EagerStep
from retinar.bench.checks import first_line
from retinar.bench.deadline import Deadline
from retinar.bench.decoding_sizes import (
    BEST_TORCH,
    EAGER,
    INT8,
    INT8_CACHE,
    OURS,
    SIZES,
    STATIC,
    Case,
    DecodingSize,
    random_weights,
)
from retinar.bench.decoding_state import filled_cache, on_one_page, step_inputs
from retinar.bench.plan import forget_compiled
from retinar.bench.sampling_sizes import CFG_SCALE
from retinar.bench.steps import timed_steps
from retinar.engine.kv_cache import KVCache
from retinar.kernels import ops

NAME = "decoding"
MINUTES = 9.5
WARM_UP = 2
TOLERANCE = {OURS: 0.1, INT8: 0.7, INT8_CACHE: 0.7}
"""Of the norm of the logits of plain torch: a gross error has no speed (unrelated logits are 1.4 apart). The tests have
the budgets; of random weights 36 layers make 0.05 in bf16 and 0.4 in int8."""
Say = Callable[[str], None]


class Row(NamedTuple):
    """Something to measure. ``make`` gives a step: () -> logits fp32 [2 * images, V]."""

    backend: str
    make: Callable[[], Callable[[], Tensor]]
    weights: torch.dtype
    cache: torch.dtype
    baseline: bool = False


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@dataclass
class Decoding:
    """The cases in turn; results in ``rows``, ``absent``, ``left_out`` and ``wrong``."""

    size: DecodingSize
    deadline: Deadline
    exercise: bool = False
    say: Say = to_stderr
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> None:
        """Everything that fits into the time."""
        self.threads = torch.get_num_threads()
        self.read = roofline.ReadLoop(self.size.read_bytes)
        model = None
        for case in self.size.cases:
            if not self.exercise and not self.deadline.fits(case.seconds):
                self.left_out.append(f"{NAME} of {_named(case)}, for lack of time")
                continue
            if case.model != model:
                model = case.model
                self._load(case)
            self._case(case)
        self._unload()

    def content(self) -> dict[str, Any]:
        """As a result file holds it."""
        about = {"context": self.size.context, "page_size": self.size.page_size, "cfg_scale": CFG_SCALE}
        read = f"torch sums {self.size.read_bytes >> 20} MiB of fp32, {self.threads} threads"
        return {**about, "read": read, "rows": self.rows, "absent": self.absent}

    def _load(self, case: Case) -> None:
        """A model's weights, plain and packed: the rows of one case come closely after each other."""
        self._unload()
        self.config = self.size.config(case)
        self.say(f"{case.model}: random weights, {self.config.parameter_count / 1e6:.0f} M, plain and packed")
        self.weights = random_weights(self.config, self.size.dtype)
        self.decoders: dict[bool, ops.NativeDecoder] = {}
        self.native_missing = ops.native_info()["reason"]
        if self.native_missing is None:
            for int8 in (False, True):
                self.decoders[int8] = ops.NativeDecoder(self.weights, int8=int8, threads=self.threads)

    def _unload(self) -> None:
        self.decoders = {}
        self.__dict__.pop("weights", None)
        forget_compiled()
        gc.collect()  # what a compiler holds goes in circles

    def _case(self, case: Case) -> None:
        """Compile, then measure row by row, the bandwidth before and after each."""
        forget_compiled()
        gc.collect()
        self.position = self.size.context - 1
        self.inputs = step_inputs(self.config, case.images, self.position, self.size.page_size)
        self.cache = filled_cache(self.config, 2 * case.images, self.size, self.size.dtype)
        self.say(f"{_named(case)}: compiling and measuring")
        made = {name: self._compiled(case, name) for name in BEST_TORCH}
        self.compiled = {name: each for name, each in made.items() if each is not None}
        self.expected: Tensor | None = None
        for row in self._rows(case):
            try:
                self._row(case, row, row.make())
            except Exception as error:
                sentence = f"{type(error).__name__}: {first_line(error)}"
                if row.baseline or isinstance(error, torch.OutOfMemoryError):
                    self._miss(case, row.backend, sentence)
                else:
                    self.wrong.append(f"{_named(case)}, {row.backend}: {sentence}")
        del self.cache, self.inputs, self.compiled

    def _rows(self, case: Case) -> Iterator[Row]:
        plain = self.size.dtype
        yield Row(EAGER, lambda: self._eager(case), plain, plain, True)
        for name, made in self.compiled.items():
            yield Row(name, lambda made=made: made[0], plain, plain, True)  # type: ignore[misc]
        if self.native_missing is not None:
            for name in (OURS, INT8, INT8_CACHE):
                self._miss(case, name, self.native_missing)
            return
        yield Row(OURS, lambda: self._ours(False, self.cache), plain, plain)
        yield Row(INT8, lambda: self._ours(True, self.cache), torch.int8, plain)
        yield Row(INT8_CACHE, lambda: self._ours(True, self._int8_cache(case)), torch.int8, torch.int8)

    def _row(self, case: Case, row: Row, step: Callable[[], Tensor]) -> None:
        """Check, time, and hold against the limit that the bandwidth before and after gives."""
        logits_BV = step()
        if self.expected is None:
            self.expected = logits_BV.clone()
        error = float((logits_BV - self.expected).norm() / self.expected.norm())
        if not error <= TOLERANCE.get(row.backend, 0.1):
            sentence = f"its logits differ from plain torch's by {error:.2g} of their norm"
            if row.baseline:
                self._miss(case, row.backend, sentence)
            else:
                self.wrong.append(f"{_named(case)}, {row.backend}: {sentence}")
            return
        before = self._machine(row.weights)
        seconds = self._timed(step, self.size.seconds)
        after = self._machine(row.weights)
        work = roofline.work_of(self.config, case.images, self.size.context, row.weights, row.cache)
        limit = roofline.limit(work, before, after)
        median = statistics.median(seconds)
        self.rows.append(
            {
                "name": NAME,
                "model": case.model,
                "images": case.images,
                "backend": row.backend,
                "baseline": row.baseline,
                "weights": _words(row.weights),
                "cache": _words(row.cache),
                "steps": len(seconds),
                "step_p50": median,
                "step_min": min(seconds),
                "step_max": max(seconds),
                "images_per_minute": 60 * case.images / (median * self.config.block_size),
                "read_bytes_per_s": [before.bytes_per_s, after.bytes_per_s],
                "flops_per_s": [before.flops_per_s, after.flops_per_s] if limit is not None else None,
                **work._asdict(),
                "limit_seconds": limit,
                "share": None if limit is None else limit / median,
                "error": error,
                "compile_seconds": self.compiled[row.backend][1] if row.backend in self.compiled else None,
                **self._where(row),
            }
        )
        told = "-" if limit is None else f"{100 * limit / median:.0f} % of the limit"
        self.say(f"  {row.backend}: {1e3 * median:.2f} ms, {told}; {before.said()} before, {after.said()} after")

    def _machine(self, weights: torch.dtype) -> roofline.Rates:
        """What this machine allows now."""
        return roofline.Rates(self.read.bytes_per_s(), roofline.product_rate(self.size.side, weights))

    def _timed(self, step: Callable[[], object], seconds: float) -> list[float]:
        """Seconds of each step, of as many as fit into ``seconds``."""
        began = time.perf_counter()
        first = timed_steps(step, 1, "cpu", warm_up=WARM_UP)[0]
        left = seconds - (time.perf_counter() - began)
        count = min(self.size.most, max(self.size.least, int(left / max(first, 1e-6))))
        return timed_steps(step, count, "cpu", warm_up=0)

    def _where(self, row: Row) -> dict[str, object]:
        """Of ours, where the time goes: ``phases``, the decoder's own clock over a few more steps; and the time of a
        step that attends over one page at most, hence what the cache costs."""
        if row.baseline:
            return {}
        decoder = self.decoders[row.weights == torch.int8]
        cache = self.int8_cache if row.cache == torch.int8 else self.cache
        clock = torch.zeros(len(decoder.phases), dtype=torch.float64)
        step = self._step(decoder, cache, self.inputs, clock)
        for _ in range(self.size.least):
            step()
        spent = (clock / self.size.least).tolist()
        phases = [{"name": name, "seconds": each} for name, each in zip(decoder.phases, spent, strict=True)]
        short = self._step(decoder, cache, on_one_page(self.inputs, self.position, self.size.page_size))
        median = statistics.median(self._timed(short, self.size.seconds / 4))
        return {"phases": phases, "short_step_p50": median}

    def _eager(self, case: Case) -> Callable[[], Tensor]:
        module = EagerStep(self.weights, case.images, self.config.block_size)
        module.load(self.cache.k_LPSGD, self.cache.v_LPSGD, self.inputs.block_table_BM)
        return _advancing(module, self.inputs.tokens_B.clone(), self.position)

    def _compiled(self, case: Case, name: str) -> tuple[Callable[[], Tensor], float] | None:
        """(a step, seconds of compiling it), or None with the reason in ``absent``."""
        if not self.exercise and not self.deadline.fits(case.seconds):
            self._miss(case, name, "there was no time to compile it")
            return None
        length = self.config.block_size if name == STATIC else self.size.context
        tokens_B = self.inputs.tokens_B.clone()
        began = time.perf_counter()
        try:
            module = static_cache.StaticCacheStep(self.weights, case.images, length, fused=True)
            static_cache.copy_cache(module, self.cache.k_LPSGD, self.cache.v_LPSGD, self.inputs.block_table_BM)
            example = tokens_B, torch.tensor([self.position]), CFG_SCALE
            step = static_cache.frozen(module, "exercise" if self.exercise else "cpu", *example)
        except Exception as error:
            self._miss(case, name, f"{type(error).__name__}: {first_line(error)}")
            return None
        seconds = time.perf_counter() - began
        self.say(f"  {name}: compiled in {seconds:.0f} s")
        return _advancing(step, tokens_B, self.position), seconds

    def _ours(self, int8: bool, cache: KVCache) -> Callable[[], Tensor]:
        return self._step(self.decoders[int8], cache, self.inputs)

    def _step(
        self, decoder: ops.NativeDecoder, cache: KVCache, inputs: ops.StepInputs, clock: Tensor | None = None
    ) -> Callable[[], Tensor]:
        inputs = inputs._replace(tokens_B=inputs.tokens_B.clone())
        caches = cache.k_LPSGD, cache.v_LPSGD
        scales = cache.k_scale_LPSG, cache.v_scale_LPSG

        def step() -> Tensor:
            codes_I, logits_BV = decoder.step(*caches, inputs, *scales, seconds=clock)
            inputs.tokens_B.copy_(codes_I.repeat(2))
            return logits_BV

        return step

    def _int8_cache(self, case: Case) -> KVCache:
        self.int8_cache = filled_cache(self.config, 2 * case.images, self.size, torch.int8, like=self.cache)
        return self.int8_cache

    def _miss(self, case: Case, backend: str, reason: str) -> None:
        self.absent.append({"model": case.model, "images": case.images, "backend": backend, "reason": reason})
        self.say(f"  {backend}: absent, {reason}")


def _advancing(step: Callable[..., tuple[Tensor, Tensor]], tokens_B: Tensor, position: int) -> Callable[[], Tensor]:
    """A call that makes a step at one position and gives its tokens to the next."""
    position_1 = torch.tensor([position])

    def advance() -> Tensor:
        next_B, logits_BV = step(tokens_B, position_1, CFG_SCALE)
        tokens_B.copy_(next_B)
        return logits_BV

    return advance


def _named(case: Case) -> str:
    return f"{case.model}, {case.images} image{'s' * (case.images > 1)}"


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measured(minutes: float = MINUTES, *, exercise: bool = False, say: Say = to_stderr) -> dict[str, Any]:
    """{"decoding", "left_out", "wrong", "minutes"} of a run on this machine's CPU."""
    deadline = Deadline(60 * minutes)
    run = Decoding(SIZES["exercise" if exercise else "cpu"], deadline, exercise=exercise, say=say)
    run.run()
    return {NAME: run.content(), "left_out": run.left_out, "wrong": run.wrong, "minutes": deadline.spent / 60}


def add_to(document: dict[str, Any], minutes: float = MINUTES, *, exercise: bool = False, say: Say = to_stderr) -> None:
    """Measure, and put the figures and the states of their targets into a result."""
    found = measured(minutes, exercise=exercise, say=say)
    document[NAME] = found[NAME]
    document["left_out"] = [*document.get("left_out", []), *found["left_out"]]
    document["tests"] = {**document["tests"], "failed": [*document["tests"].get("failed", []), *found["wrong"]]}
    if exercise:
        document["exercise"] = True
    document[NAME]["targets"] = targets_decoding.evaluate(document)
    document[NAME]["minutes"] = found["minutes"]


def alone(out: Path, minutes: float = MINUTES, *, exercise: bool = False, say: Say = to_stderr) -> tuple[Path, dict]:
    """A result of decoding and nothing else, written under ``out``: (its path, its content)."""
    document: dict[str, Any] = {**record.document("cpu", [], {}, {}), "only": NAME}
    add_to(document, minutes, exercise=exercise, say=say)
    return record.save(out, document), document


def main(argv: Sequence[str]) -> int:
    """0: all right; 1: a step is wrong."""
    from retinar.bench.report import markdown

    parser = argparse.ArgumentParser(prog="python -m retinar.bench.decoding", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of results (bench/results)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (9.5); the rest is named")
    parser.add_argument("--exercise", action="store_true", help="all of it at tiny sizes; its times say nothing")
    flags = parser.parse_args(argv)
    path, content = alone(flags.out, flags.minutes, exercise=flags.exercise)
    print(f"{markdown(content)}\n\nwritten to {path}")
    return 1 if content["tests"]["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
