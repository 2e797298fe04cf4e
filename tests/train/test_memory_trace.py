"""The count of a step's memory: against the allocator's own, and against what the launchers of kernels allocate."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch

from retinar.kernels import launch
from retinar.kernels.launch import triton_missing
from retinar.train.memory_trace import MemoryTrace, held
from retinar.train.scratch import SCRATCH


def test_trace_counts_what_the_allocator_counts() -> None:
    """torch's profiler records every allocation of the CPU's allocator."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(64, 300), torch.nn.GELU(), torch.nn.LayerNorm(300)),
        *(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    images = torch.randn(50, 64)

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    trace = MemoryTrace()
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    trace.add([*model.parameters(), *state, images], "parameters")
    before = trace.peak
    with trace:
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    result: Any = recorded.profiler
    sizes = [event.nbytes() for event in result.kineto_results.events() if event.name() == "[memory]"]
    # Numbers that an op makes of Python's, a few bytes each, never reach a dispatcher.
    assert trace.peak - before == pytest.approx(max(itertools.accumulate(sizes)), abs=64)


def beside(monkeypatch: pytest.MonkeyPatch, folder: str, op: str, arguments: tuple[Any, ...]) -> int:
    """What a launcher allocates beside its results; the kernels themselves are left out."""
    module = importlib.import_module(f"retinar.kernels.{folder}.gpu")
    monkeypatch.setattr(launch.Kernel, "launch", lambda *_: None)
    monkeypatch.setattr(module, "_product", lambda *_, **__: None, raising=False)
    trace = MemoryTrace()
    inputs = [each for each in arguments if isinstance(each, torch.Tensor)]
    trace.add(inputs, "parameters")
    with trace:
        results = getattr(module, op)(*arguments)
    return trace.peak - held(inputs) - held([results] if isinstance(results, torch.Tensor) else results)


@pytest.mark.skipif(triton_missing() is not None, reason="Triton is missing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_what_the_launchers_allocate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens, vocabulary in ((5, 37), (4097, 24), (40_000, 16)):
        hidden, weight = torch.empty(tokens, 8, dtype=dtype), torch.empty(vocabulary, 8, dtype=dtype)
        arguments = hidden, weight, torch.zeros(tokens, dtype=torch.int64)
        for gradients in (True, False):
            found = beside(monkeypatch, "linear_cross_entropy", "linear_cross_entropy", (*arguments, gradients))
            assert SCRATCH["retinar::linear_cross_entropy"](*arguments, gradients) == found
    for heads, groups, positions, dim in ((2, 2, 300, 64), (4, 2, 300, 32), (2, 1, 40, 64), (4, 4, 130, 100)):
        qkv = torch.empty(2, positions, heads + 2 * groups, dim, dtype=dtype)
        settings = torch.empty(positions, dim // 2, 2), 0.1, torch.zeros((), dtype=torch.int64), 1.0
        grad = torch.empty(2, positions, heads, dim, dtype=dtype).transpose(1, 2)
        lse = torch.empty(2, heads, positions)
        for op, given in (
            ("rope_attention_packed", (qkv, heads, *settings)),
            ("rope_attention_packed_backward", (grad, qkv, heads, grad, lse, *settings)),
        ):
            found = beside(monkeypatch, "rope_attention", op, given)
            assert SCRATCH[f"retinar::{op}"](*given) == found, (op, heads, groups, dim)
    for rows, width in ((3, 64), (2000, 1280), (9000, 320)):
        x, weight = torch.empty(rows, width, dtype=dtype), torch.empty(width, dtype=dtype)
        for op, given in (
            ("rms_norm_backward", (x, x, weight, 1e-5)),
            ("add_rms_norm_backward", (x, x, x, weight, 1e-5)),
        ):
            # At most: how many programs share a norm's rows is the tiles' business.
            most, found = SCRATCH[f"retinar::{op}"](*given), beside(monkeypatch, "rms_norm", op, given)
            assert found <= most <= found + 4 * 1024 * width
