"""Training speed: our step as `retinar train gpt` makes it against LlamaGen's loop, in turns, in one run.

Equal model, batch, precision and compile setting, first both eager, then both compiled. A turn is a few steps of one of
them; every round has a turn of each, the other one first the next time, and matrix products between the rounds: on a
machine whose speed drifts only what was measured together can be compared. A figure is the median over the turns.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retinar.bench import record, targets_training
from retinar.bench.baselines import upstream_training
from retinar.bench.baselines.upstream import Upstream
from retinar.bench.checks import first_line
from retinar.bench.deadline import Deadline
from retinar.bench.plan import forget_compiled
from retinar.bench.targets_training import LLAMAGEN, NAME, OURS, PLAIN
from retinar.bench.training_contenders import Contender, Ours, Plain, SpeedSize, Theirs, training_config
from retinar.train.flops import gpt_step_flops
from retinar.train.meters import matmul_flops_per_s

Say = Callable[[str], None]


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


@dataclass
class TrainingSpeed:
    """Results in ``rows``, ``absent``, ``rates`` (of matrix products) and ``wrong``."""

    size: SpeedSize
    device: str
    clone: Path | None
    deadline: Deadline
    say: Say = to_stderr
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Everything that fits into the time."""
        with ExitStack() as stack:
            self.process = None
            if self.clone is not None:
                script = Path(upstream_training.__file__)
                self.process = stack.enter_context(Upstream(self.clone, script))
            for compiled in self.size.compiled:
                self._setting(compiled)
                forget_compiled()
                gc.collect()  # what a compiler holds goes in circles

    def _setting(self, compiled: bool) -> None:
        """All that compare, made one after the other, then measured in turns."""
        turns: dict[str, list[dict[str, Any]]] = {}
        with ExitStack() as stack:
            racing: dict[str, Contender] = {}
            for name, make in self._contenders(compiled):
                self.say(f"{name}{', compiled' * compiled}: making and warming up")
                try:
                    racing[name] = stack.enter_context(closing(make()))
                except Exception as error:
                    self._failed(name, compiled, error)
            for number in range(self.size.turns):
                if not racing or (number and not self.deadline.fits(self._seconds(turns))):
                    break
                self.rates.append(matmul_flops_per_s(torch.device(self.device), self.size.precision))
                for name in list(racing) if number % 2 else list(racing)[::-1]:
                    try:
                        found = racing[name].turn(self.size.steps, self.size.uncounted)
                    except Exception as error:
                        self._failed(name, compiled, error)
                        del racing[name]
                        continue
                    turns.setdefault(name, []).append(found)
                    self.say(f"  {name}: {found['seconds']:.3f} s a step")
            for name, each in racing.items():
                if turns.get(name):
                    self._row(name, compiled, each, turns[name])

    def _contenders(self, compiled: bool) -> Iterator[tuple[str, Callable[[], Contender]]]:
        size, device = self.size, self.device
        yield OURS, lambda: Ours(training_config(size, device, compiled))
        if self.process is None:
            yield PLAIN, lambda: Plain(size, device, compiled)
        else:
            process = self.process
            yield LLAMAGEN, lambda: Theirs(process, size, device, compiled, self.deadline)

    def _row(self, name: str, compiled: bool, made: Contender, turns: list[dict[str, Any]]) -> None:
        seconds = [turn["seconds"] for turn in turns]
        config, median = self.size.config, statistics.median(seconds)
        if not abs(made.first_loss / math.log(config.vocab_size) - 1) < 0.02 or not turns[-1]["loss"] < made.first_loss:
            told = f"loss {made.first_loss:.3f} at the first step, {turns[-1]['loss']:.3f} at the last"
            self.wrong.append(f"{name}{', compiled' * compiled} does not train: {told}")
        flops = sum(gpt_step_flops(config, self.size.images).values())
        self.rows.append(
            {
                "name": NAME,
                "backend": name,
                "baseline": name != OURS,
                "compiled": compiled,
                "turns": len(seconds),
                "steps": len(seconds) * self.size.steps,
                "seconds": median,
                "fastest": min(seconds),
                "slowest": max(seconds),
                "all_seconds": seconds,
                "all_cpu_seconds": [turn["cpu_seconds"] for turn in turns],
                "tokens_per_s": self.size.images * config.block_size / median,
                "flops": flops,
                "flops_per_s": flops / median,
                "peak_bytes": turns[-1]["peak_bytes"],
                "first_loss": made.first_loss,
                "last_loss": turns[-1]["loss"],
                "warm_up_seconds": made.warm_up_seconds,
            }
        )

    def _failed(self, name: str, compiled: bool, error: Exception) -> None:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if name == OURS and not isinstance(error, torch.OutOfMemoryError):
            self.wrong.append(f"{name}{', compiled' * compiled}: {reason}")
        self.absent.append({"backend": name, "compiled": compiled, "reason": reason})
        self.say(f"  {name}: absent, {reason}")

    def _seconds(self, turns: Mapping[str, list[dict[str, Any]]]) -> float:
        """What a round is taken to need, by the last one."""
        steps = self.size.steps + self.size.uncounted
        return 1.0 + sum(steps * found[-1]["seconds"] for found in turns.values())

    def content(self) -> dict[str, Any]:
        """As a result file holds it. ``matmul_flops_per_s``: the median over the run of what products reach."""
        config, rate = self.size.config, statistics.median(self.rates) if self.rates else None
        for row in self.rows:
            row["mfu"] = row["flops_per_s"] / rate if rate else None
        return {
            "model": self.size.model,
            "parameters": config.parameter_count,
            "images": self.size.images,
            "codes": config.block_size,
            "precision": self.size.precision,
            "steps_a_turn": self.size.steps,
            "matmul_flops_per_s": rate,
            "matmul_rates": self.rates,
            "rows": self.rows,
            "absent": self.absent,
        }


def measure(
    out: Path,
    size: SpeedSize,
    device: str,
    clone: Path | None,
    minutes: float,
    *,
    exercise: bool = False,
    say: Say = to_stderr,
) -> tuple[Path, dict[str, Any]]:
    """Measure and write a result under ``out``: (its path, its content)."""
    deadline = Deadline(60 * minutes)
    speed = TrainingSpeed(size, device, clone, deadline, say)
    speed.run()
    document: dict[str, Any] = {**record.document(device, [], {}, {"failed": speed.wrong}), "only": NAME}
    if exercise:
        document["exercise"] = True
    document[NAME] = {**speed.content(), "minutes": deadline.spent / 60}
    document[NAME]["targets"] = targets_training.evaluate(document)
    return record.save(out, document), document
