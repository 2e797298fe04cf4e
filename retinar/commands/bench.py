"""``retinar bench``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retinar.engine.progress import Progress


@dataclass
class Bench:
    """Time every op with every backend, forward and backward, beside what this device allows and beside plain torch,
    SDPA and other libraries' kernels; check it first, and file the figures. For a GPU, see also `make gpu`.

    Example: retinar bench --only rope_attention
    """

    device: Literal["cpu", "cuda"] = "cpu"
    """What to measure."""
    out: Path = Path("bench/results")
    """Folder of results; one JSON is written to OUT/<device>/."""
    only: str | None = None
    """Benchmarks whose name contains this (an expression as pytest's -k takes it); "decoding": the CPU's decode step
    beside torch and the machine's limit, alone.
    """
    llama_cpp: Path | None = None
    """A built llama.cpp (a folder that holds llama-batched-bench, bin or build/bin; or the program), whose decode step
    is then measured beside the CPU's.
    """

    def run(self, progress: Progress) -> dict[str, object]:
        """Run the suite; the summary is the result file's content and its path. Exit code 1 when something is wrong."""
        from retinar.bench.run import run_suite

        path, content = run_suite(self.device, self.out, self.only, self.llama_cpp)
        wrong = content["tests"].get("failed", [])
        for each in wrong:
            print(f"retinar: found wrong: {each}; it has no time in {path}", file=sys.stderr, flush=True)
        return {"file": path, **content, **({"exit_code": 1} if wrong else {})}

    def render(self, found: Mapping[str, Any]) -> str:
        """The table of the result file."""
        from retinar.bench.report import markdown

        return f"{markdown(found)}\n\nwritten to {found['file']}"
