"""One decode step under torch's profiler: where its time goes, and a trace that Chrome or Perfetto opens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retinar.bench import profile
from retinar.kernels import ops

LARGEST = 16 * 2**20
"""Bytes of a trace that is kept."""


def step_profile(step: Callable[[], object], device: str, path: Path, *, blas: bool = False) -> dict[str, Any]:
    """`profile.describe` of one call of ``step``, its trace written to ``path`` (.json.gz).

    ``blas``: whether its products are meant to be torch's. "wrong": sentences on work that our kernels should do, where
    they run; "left_out": on a trace that is too large to keep.
    """
    work = profile.DECODING_BLAS if blas else profile.DECODING
    _synchronize(device)
    with torch.profiler.profile(activities=profile.activities(device), acc_events=True) as recorded:
        began = time.perf_counter()
        step()
        _synchronize(device)
        seconds = time.perf_counter() - began
    found = profile.describe(recorded, work=work)
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
    size = path.stat().st_size
    left_out = []
    if size > LARGEST:
        path.unlink()
        left_out.append(
            f"the trace of a decode step: it has {size / 2**20:.0f} MiB, at most {LARGEST / 2**20:.0f} are kept"
        )
    wrong = []
    if ops.preferred("decode_step", device) == "triton":
        wrong += [f"a decode step uses no kernel of {op}" for op in found["missing"]]
        wrong += [f"a decode step runs {name} beside our kernels" for name in found["replaced"]]
    trace = None if left_out else path.name
    return {
        **found,
        "seconds_profiled": seconds,
        "trace": trace,
        "trace_bytes": size,
        "wrong": wrong,
        "left_out": left_out,
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
