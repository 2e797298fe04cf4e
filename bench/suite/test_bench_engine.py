"""Times of the engine as a whole; no limit beside them: many ops of many sizes are in one call."""

from __future__ import annotations

from typing import Any

from retinar.bench.engine import EngineCall


def test_engine(benchmark: Any, engine_call: EngineCall) -> None:
    benchmark.pedantic(engine_call.call, rounds=3, warmup_rounds=1)
    stats = benchmark.stats.stats
    benchmark.extra_info["row"] = {
        "name": engine_call.name,
        "case": engine_call.case,
        "dtype": "float32",
        "backend": "-",
        "seconds": stats.median,
        "fastest": stats.min,
        "slowest": stats.max,
        "runs": stats.rounds,
        "images_per_s": engine_call.images / stats.median,
        "share": None,
    }
