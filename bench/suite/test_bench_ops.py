"""Times of the ops and of what they are compared with, forward and backward.

An op is checked first: a fast wrong answer has no time.
"""

from __future__ import annotations

import itertools
from typing import Any

from retinar.bench.checks import first_line
from retinar.bench.ops import Measurement, check_cases, name_of
from retinar.bench.timing import Timing, measure, peak_bytes


def test_op(benchmark: Any, measurement: Measurement, device_limits: Any, inputs: Any, absent: Any) -> None:
    wrong = None if measurement.baseline else check_cases(measurement)
    assert wrong is None, wrong
    limit = device_limits[measurement.dtype]
    try:
        calls = measurement.calls(inputs(measurement))
        calls[0]()
    except Exception as error:
        if not measurement.baseline:
            raise
        absent(measurement, f"{type(error).__name__}: {first_line(error)}")
    turn = itertools.cycle(calls)
    benchmark.pedantic(lambda: next(turn)(), rounds=10, warmup_rounds=2)
    stats = benchmark.stats.stats
    timing = Timing(stats.median, stats.min, stats.max, stats.rounds)
    if measurement.device == "cuda":  # the wall clock sees the launch alone: events see the work
        timing = measure(calls, "cuda")
    peak = peak_bytes(calls[0], measurement.device) if measurement.direction == "both" else None
    row = measurement.row(timing, limit, peak)
    benchmark.extra_info.update(row=row, limits={name_of(measurement.dtype): limit._asdict()})
