"""What sampling is compared with, in the same run: our references, a compiled static cache, LlamaGen's own code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from retinar.bench.baselines import static_cache
from retinar.bench.baselines.upstream import Upstream, model_arguments
from retinar.bench.plan import forget_compiled
from retinar.bench.sampling_sizes import CFG_SCALE, REFERENCE, STATIC, UPSTREAM
from retinar.bench.steps import Steps, timed_steps
from retinar.bench.windows import fill, middle, place, runner_window
from retinar.engine.runner import EagerRunner
from retinar.engine.step_batch import front

if TYPE_CHECKING:
    from retinar.bench.sampling import Job, Sampling

COMPILE_SECONDS = 120
"""What torch.compile is taken to need for GPT-XL's layers."""
WARM_UP = 3
"""Steps: the first compiles, the second records a graph."""
UPSTREAM_SECONDS = {"eager": 25, "compile": COMPILE_SECONDS}
WHOLE_SECONDS = 30
"""LlamaGen's whole images are made where they take no longer; else a window of steps stands for them."""


def jobs(bench: Sampling) -> Iterator[Job]:
    """Those in this process."""
    from retinar.bench.sampling import Job

    for images in bench.size.references:
        yield Job(REFERENCE, images, 20, lambda i=images: references(bench, i), True)  # type: ignore[misc]
    for images in bench.size.static:
        yield Job(STATIC, images, COMPILE_SECONDS, lambda i=images: static(bench, i), True)  # type: ignore[misc]


def references(bench: Sampling, images: int) -> None:
    """The reference of every op, one by one."""
    sampler = bench.sampler(backend="reference")
    loop = bench.loop(sampler, bench.requests(sampler, images))
    window = max(2, bench.size.window // 4)
    bench.add(
        runner_window(loop.runner, images, window, CFG_SCALE, bench.device), images, backend=REFERENCE, baseline=True
    )


@torch.no_grad()
def static(bench: Sampling, images: int) -> None:
    """Plain torch through torch.compile. It is compared with our reference, from one cache, before it is timed."""
    forget_compiled()
    config, window = bench.size.config, bench.size.window
    first = middle(config.block_size, window)
    sampler = bench.sampler(backend="reference")
    module = static_cache.StaticCacheStep(sampler.decoding.weights, images, config.block_size)
    run = static_cache.compiled(module, bench.device, "exercise" if bench.exercise else bench.device)
    position_1 = torch.tensor([first], device=bench.device)

    loop = bench.loop(sampler, bench.requests(sampler, images))
    runner = loop.runner
    assert isinstance(runner, EagerRunner)
    fill(runner.cache)
    inputs = front(runner.buffers(images), images, 2 * images)
    place(inputs, first, config.block_size, runner.cache.page_size, config.vocab_size, CFG_SCALE)
    tokens_B = inputs.tokens_B.clone()
    static_cache.copy_cache(module, runner.cache.k_LPSGD, runner.cache.v_LPSGD, inputs.block_table_BM)
    runner.step(inputs)
    expected_BV = runner.logits_BV
    assert expected_BV is not None
    wrong = static_cache.disagrees(run(tokens_B, position_1, CFG_SCALE)[1], expected_BV)
    if wrong is not None:
        bench.absent[STATIC, images] = wrong
        return
    del loop, runner, inputs, expected_BV, sampler
    bench.free()

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        tokens_B.copy_(run(tokens_B, position_1, CFG_SCALE)[0])
        position_1.add_(1)

    position_1.fill_(max(1, first - WARM_UP))  # position 0 would take tokens for labels
    seconds = timed_steps(step, window, bench.device, warm_up=min(first - 1, WARM_UP))
    bench.add(Steps(seconds, first), images, backend=STATIC, baseline=True)


def upstream(bench: Sampling, late: list[str]) -> None:
    """LlamaGen from the user's clone, every number of images eager and compiled; ``late``: what did not fit."""
    combinations = [(mode, images) for mode in UPSTREAM for images in bench.size.upstream]
    if bench.upstream is None:
        for mode, images in combinations:
            bench.absent[UPSTREAM[mode], images] = "no clone was named (--upstream PATH)"
        return
    if not bench.exercise and not bench.deadline.fits(UPSTREAM_SECONDS["eager"]):
        late += [f"{UPSTREAM[mode]} ({images} images)" for mode, images in combinations]
        return
    bench.free()
    process = Upstream(bench.upstream)
    try:
        for mode, images in combinations:
            name = UPSTREAM[mode]
            if not bench.deadline.fits(0.0 if bench.exercise else UPSTREAM_SECONDS[mode]):
                late.append(f"{name} ({images} images)")
                continue
            if process.over:
                process = Upstream(bench.upstream)
            with_process(bench, process, mode, images, late)
    finally:
        process.__exit__()


def with_process(bench: Sampling, process: Upstream, mode: str, images: int, late: list[str]) -> None:
    """One measurement in LlamaGen's process."""
    size, config, name = bench.size, bench.size.config, UPSTREAM[mode]
    first = middle(config.block_size, size.window)
    compiler = "" if mode == "eager" else "aot_eager" if bench.exercise else "reduce-overhead"
    job: dict[str, Any] = {
        "device": bench.device,
        "dtype": str(size.dtype).removeprefix("torch."),
        "model": model_arguments(config),
        "images": images,
        "cfg_scale": CFG_SCALE,
        "compile": compiler,
        "first": first,
        "steps": size.window,
        "whole_seconds": min(WHOLE_SECONDS, bench.deadline.left / 4),
    }
    found = process.measure(job, bench.deadline.left)
    if found.get("late"):
        late.append(f"{name} ({images} images): {found['error']}")
    elif "error" in found:
        bench.absent[name, images] = found["error"]
    else:
        steps = Steps(found["seconds"], first, found["whole"])
        more = {"attention": found["attention"], "peak_bytes": found["peak_bytes"], "compile": compiler or None}
        bench.add(steps, images, backend=name, baseline=True, warm_up_seconds=found["warm_up_seconds"], **more)
