"""What is compiled ahead of a run is what its launches look up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retinar.bench import precompile
from retinar.bench.deadline import Deadline
from retinar.kernels.launch import triton_missing

ROOT = Path(__file__).resolve().parents[2]

# A process of its own: the cache's folder is read once, and the made-up driver stays.
LOOKED_UP = """
import os, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor
from retinar.bench import precompile
from retinar.kernels import aot
from retinar.kernels.launch import TYPES

job = next(job for job in precompile.jobs(90) if job.kernel == "swiglu_forward")
assert precompile.compile_job(job) is None
before = set(os.listdir(os.environ["TRITON_CACHE_DIR"]))
assert before

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device=0): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

triton.runtime.driver.set_active(Driver())
kernel = next(kernel for kernel in aot.kernels() if kernel.name == job.kernel)
variant = aot.ordered(kernel, 90)[job.place]
types = {name: dtype for dtype, name in TYPES.items()}
pointers = [MockTensor(types[name]) for name in variant.pointers]
numbers = [4096] * (len(kernel.function.params) - len(pointers) - len(variant.constants))
options = dict(variant.constants, num_warps=variant.num_warps, num_stages=variant.num_stages)
kernel.function.warmup(*pointers, *numbers, **options, grid=(1,))
assert set(os.listdir(os.environ["TRITON_CACHE_DIR"])) == before, "the launch compiled again"
"""


@pytest.mark.skipif(triton_missing() is not None, reason="needs triton")
def test_the_kernels_of_some_ops() -> None:
    found = {job.kernel for job in precompile.jobs(90, ("cfg_sample", "swiglu"))}
    assert {"cfg_sample", "swiglu_forward"} <= found and "linear" not in found
    assert found < {job.kernel for job in precompile.jobs(90)}


@pytest.mark.skipif(triton_missing() is not None, reason="needs triton")
def test_a_launch_finds_what_was_compiled_before(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LOOKED_UP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(triton_missing() is not None, reason="needs triton")
def test_narrow_variants_come_first_and_all_are_there() -> None:
    from retinar.kernels import aot

    jobs = precompile.jobs(80)
    assert len(jobs) == len(set(jobs)) == sum(len(kernel.variants[80]) for kernel in aot.kernels())
    kernels = {kernel.name: kernel for kernel in aot.kernels()}
    narrow = ["bf16" in aot.ordered(kernels[job.kernel], 80)[job.place].pointers for job in jobs]
    assert narrow == sorted(narrow, reverse=True) and any(narrow)


def test_architectures() -> None:
    assert [precompile.nearest(*each) for each in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0))] == [80, 80, 80, 90, 90]


@pytest.mark.skipif(triton_missing() is not None, reason="needs triton")
def test_without_time_nothing_is_compiled() -> None:
    found = precompile.precompile(90, 1, Deadline(1))
    assert found["compiled"] == 0 and found["failed"] == [] and found["variants"]
