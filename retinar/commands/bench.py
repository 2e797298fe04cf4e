"""``retinar bench``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from retinar.engine.progress import Progress

RESULTS = Path("bench/results")


@dataclass
class Table3:
    """Only with `table3`: both methods trained for the same time, sampled and scored."""

    data: Path | None = None
    """Photographs in any layout of `retinar prepare`, or a folder it prepared, with train, valid and test."""
    budget: float = 60.0
    """Minutes of training for our method, and for every recipe of the baseline."""
    autoregressive: Path | None = None
    """A trained transformer with its tokenizer, in the place of a training."""
    iddpm: Path | None = None
    """A trained diffusion model, in the place of a training."""
    tokenizer: Path | None = None
    """A trained tokenizer: the whole budget is the transformer's then."""
    recipes: tuple[str, ...] = ()
    """Recipes of the baseline, the better of which counts; by default those for the device and size."""
    tune: int = 24
    """Images a class for each sampling setting tried on the valid split; 0 tries none."""
    count: int | None = None
    """Images a class to score; by default as many as the test split has."""
    size: int | None = None
    """Side of the images, 128 or 256; by default what our method's recipe or checkpoint has."""
    vgg: Path | None = None
    """VGG16's weights for the tokenizer's training; by default where torch hub keeps them."""
    inception: Path | None = None
    """A TorchScript file of the Inception network of 2015; by default the installed one."""
    bootstrap: int = 200
    """Resamplings for the intervals; 0 leaves them out."""
    seed: int = 0
    """Of the samples."""
    set: tuple[str, ...] = ()
    """Changes to the recipes: tokenizer.KEY=VALUE, gpt.KEY=VALUE, iddpm.KEY=VALUE."""


@dataclass
class Bench:
    """Time every op with every backend, forward and backward, beside what this device allows and beside plain torch,
    SDPA and other libraries' kernels; check it first, and file the figures. For a GPU, see also `make gpu`.
    `table3` compares the whole method with iDDPM instead: the paper's Table 3 and Figure 2.

    Example: retinar bench --only rope_attention
    Example: retinar bench table3 --data DR_grading --budget 60 --out table3
    """

    what: Annotated[Literal["kernels", "table3"], tyro.conf.Positional] = "kernels"
    """What to measure."""
    device: Literal["cpu", "cuda"] | None = None
    """Where; kernels: by default cpu, table3: by default the GPU where there is one."""
    out: Path | None = None
    """kernels: folder of results (bench/results); one JSON is written to OUT/<device>/. table3: the folder to write;
    the same command again goes on.
    """
    only: str | None = None
    """Benchmarks whose name contains this (an expression as pytest's -k takes it); "decoding": the CPU's decode step
    beside torch and the machine's limit, alone.
    """
    llama_cpp: Path | None = None
    """A built llama.cpp (a folder that holds llama-batched-bench, bin or build/bin; or the program), whose decode step
    is then measured beside the CPU's.
    """
    table3: Annotated[Table3, tyro.conf.arg(name="")] = field(default_factory=Table3)

    def run(self, progress: Progress) -> dict[str, object]:
        """Run it; the summary is the result file's content and its path. Exit code 1 when something is wrong."""
        if self.what == "table3":
            return self._table3(progress)
        from retinar.bench.run import run_suite
        from retinar.engine.errors import InputError

        if self.table3 != Table3():
            raise InputError("Expected --data, --budget and the like with `bench table3` only: leave them out.")
        path, content = run_suite(self.device or "cpu", self.out or RESULTS, self.only, self.llama_cpp)
        wrong = content["tests"].get("failed", [])
        for each in wrong:
            print(f"retinar: found wrong: {each}; it has no time in {path}", file=sys.stderr, flush=True)
        return {"file": path, **content, **({"exit_code": 1} if wrong else {})}

    def _table3(self, progress: Progress) -> dict[str, object]:
        from retinar.bench.table3.comparison import Comparison, compare
        from retinar.engine.errors import InputError

        if self.only is not None or self.llama_cpp is not None:
            raise InputError("Expected --only and --llama-cpp without `table3` only: leave them out.")
        asked = self.table3
        if asked.data is None or self.out is None:
            missing = "--data" if asked.data is None else "--out"
            raise InputError(f"Expected {missing} for table3, found none: see `retinar bench --help`.")
        comparison = Comparison(
            data=asked.data,
            out=self.out,
            budget=asked.budget,
            size=asked.size,
            device=self.device,
            autoregressive=asked.autoregressive,
            iddpm=asked.iddpm,
            tokenizer=asked.tokenizer,
            recipes=asked.recipes,
            tune=asked.tune,
            count=asked.count,
            vgg=asked.vgg,
            inception=asked.inception,
            bootstrap=asked.bootstrap,
            seed=asked.seed,
            sets=asked.set,
        )
        return {"file": self.out / "table3.json", **compare(comparison, progress)}

    def render(self, found: Mapping[str, Any]) -> str:
        """The table of the result file."""
        if self.what == "table3":
            from retinar.bench.table3.page import summary

            return "\n".join([*summary(found), "", f"written to {found['file']}"])
        from retinar.bench.report import markdown

        return f"{markdown(found)}\n\nwritten to {found['file']}"
