"""Greedy codes and cached logits of upstream's own sampler, through sampler, scheduler, cache and runner.

By the reference, and in the interpreted run by the Triton kernels: there the first codes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retinar.engine import checkpoint
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.runner import DecodeLoop, EagerRunner, NativeRunner
from retinar.engine.sampler import Sampler
from retinar.kernels import ops
from tests.conftest import Ran, every_backend

SCALES, INTERVALS = (1.0, 1.5, 4.0), (-1, 5)


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "gpt_expected.safetensors")


def load(golden: Path, name: str, backend: str | None) -> Sampler:
    return Sampler(checkpoint.load_gpt(golden / name, golden / "gpt_config.json"), device="cpu", backend=backend)


@pytest.fixture(
    scope="module",
    params=[("gpt_ddp.pt", "native"), ("gpt_consolidated.pth", "native"), ("gpt_ddp.pt", "reference")],
    ids=lambda each: "-".join(each),
)
def sampler(golden: Path, request: pytest.FixtureRequest) -> Sampler:
    name, backend = request.param
    if backend == "native" and not ops.native_info()["loaded"]:
        pytest.skip(str(ops.native_info()["reason"]))
    return load(golden, name, backend)


def greedy(scale: float, interval: int, labels: list[int], start: int = 0) -> list[Request]:
    # the noise of a draw among one code decides nothing
    params = SamplingParams(cfg_scale=scale, cfg_interval=interval, top_k=1)
    return [make_request(start + i, label, params, seed=11) for i, label in enumerate(labels)]


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("scale", SCALES)
def test_greedy_codes(sampler: Sampler, vectors: dict[str, Tensor], scale: float, interval: int) -> None:
    made = dict(sampler.sample_codes(greedy(scale, interval, vectors["labels"].tolist())))
    codes_IT = torch.stack([made[i] for i in range(len(made))])
    assert torch.equal(codes_IT, vectors[f"greedy.cfg{scale}.interval{interval}"])


@pytest.mark.parametrize(("page_size", "pages", "max_images"), [(1, 100, 3), (16, 6, 8), (1024, 24, 16)])
def test_all_settings_in_one_batch(
    sampler: Sampler, vectors: dict[str, Tensor], page_size: int, pages: int, max_images: int
) -> None:
    labels = vectors["labels"].tolist()
    settings = [(scale, interval) for scale in SCALES for interval in INTERVALS]
    requests = [r for n, (scale, interval) in enumerate(settings) for r in greedy(scale, interval, labels, 10 * n)]
    made = dict(sampler.sample_codes(requests, page_size=page_size, pages=pages, max_images=max_images))
    for n, (scale, interval) in enumerate(settings):
        codes_IT = torch.stack([made[10 * n + i] for i in range(len(labels))])
        assert torch.equal(codes_IT, vectors[f"greedy.cfg{scale}.interval{interval}"]), (scale, interval)


@every_backend("reference")
def test_first_codes_on_every_backend(ran: Ran, golden: Path, vectors: dict[str, Tensor]) -> None:
    """Past the interval, settings of all kinds in one batch; all codes would take the interpreter minutes."""
    labels, codes, settings = vectors["labels"].tolist(), 9, ((1.0, -1), (1.5, -1), (4.0, -1), (4.0, 5))
    requests = [r for n, (scale, interval) in enumerate(settings) for r in greedy(scale, interval, labels, 10 * n)]
    loop = load(golden, "gpt_ddp.pt", ran.backend).loop(requests, max_images=len(requests), page_size=4)
    for request in requests:
        loop.submit(request)
    for _ in range(codes):
        loop.step()
    assert ran.ops["decode_step"] == {ran.backend}
    for image in loop.scheduler.live:
        setting, number = divmod(image.request.stream.index, 10)
        scale, interval = settings[setting]
        expected_T = vectors[f"greedy.cfg{scale}.interval{interval}"][number, :codes]
        assert torch.equal(loop.batch.codes_ST[image.slot, :codes], expected_T), (scale, interval)
    assert len(loop.scheduler.live) == len(requests)


@pytest.mark.parametrize("page_size", [1, 16, 1024])
def test_cached_logits(sampler: Sampler, vectors: dict[str, Tensor], page_size: int) -> None:
    requests = greedy(1.5, -1, vectors["labels"].tolist())
    loop: DecodeLoop = sampler.loop(requests, max_images=2, page_size=page_size)
    assert isinstance(loop.runner, EagerRunner | NativeRunner)
    for request in requests:
        loop.submit(request)
    loop.scheduler.admit()
    loop.batch.rebuild(loop.scheduler.live, sampler.config.num_classes)
    for position in range(sampler.config.block_size):
        loop.runner.step(loop.batch.inputs)
        torch.testing.assert_close(loop.runner.logits_BV, vectors["cached_logits"][:, position], atol=1e-4, rtol=0)
        loop.batch.record(vectors["tokens"][:, position])  # teacher forcing: theirs, not the drawn ones
        loop.scheduler.advance()
