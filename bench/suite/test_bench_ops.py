"""Times of the ops. Each is checked against the reference first: a fast wrong answer has no time."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from retinar.bench.ops import Measurement, check
from retinar.bench.timing import Timing, measure


def test_op(benchmark: Any, measurement: Measurement, device_limits: Any) -> None:
    spec = measurement.spec
    for case in spec.cases:
        wrong = check(spec, case, measurement.dtype, measurement.backend, measurement.device)
        assert wrong is None, wrong
    limit = device_limits[measurement.dtype]
    with torch.inference_mode():
        calls = measurement.calls()
        turn = itertools.cycle(calls)
        benchmark.pedantic(lambda: next(turn)(), rounds=10, warmup_rounds=2)
        stats = benchmark.stats.stats
        timing = Timing(stats.median, stats.min, stats.max, stats.rounds)
        if measurement.device == "cuda":  # the wall clock sees the launch alone: events see the work
            timing = measure(calls, "cuda")
    name = str(measurement.dtype).removeprefix("torch.")
    benchmark.extra_info.update(row=measurement.row(timing, limit), limits={name: limit._asdict()})
