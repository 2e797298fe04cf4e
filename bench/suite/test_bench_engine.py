"""Times of the engine as a whole."""

from __future__ import annotations

from typing import Any

from retinar.bench.engine import EngineCall, engine_row
from retinar.bench.timing import Timing


def test_engine(benchmark: Any, engine_call: EngineCall) -> None:
    benchmark.pedantic(engine_call.call, rounds=3, warmup_rounds=1)
    stats = benchmark.stats.stats
    timing = Timing(stats.median, stats.min, stats.max, stats.rounds)
    benchmark.extra_info["row"] = engine_row(engine_call, timing)
