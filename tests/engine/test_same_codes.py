"""An image's codes depend on the image alone: not on page size, batch limit, order, neighbours or the size of the pool.

Each implementation is compared with itself. The images of one batch differ in every parameter and in their positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from retinar.engine.config import GPTConfig
from retinar.engine.graphs import GraphRunner
from retinar.engine.kv_cache import KVCache, pages_for
from retinar.engine.model import GPT
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.runner import DecodeLoop, EagerRunner

BLOCK = 4  # codes an image: the interpreter takes a second a step
PARAMS = (
    SamplingParams(cfg_scale=2.0),
    SamplingParams(cfg_scale=1.0, top_k=7),
    SamplingParams(cfg_scale=4.0, temperature=0.7, top_p=0.8),
    SamplingParams(cfg_scale=1.5, cfg_interval=1),
    SamplingParams(cfg_scale=2.5, temperature=0.0, top_k=1),
    SamplingParams(cfg_scale=7.5, top_k=20, top_p=0.9, cfg_interval=0),
)


def requests(count: int) -> list[Request]:
    return [make_request(index, index % 2, PARAMS[index % len(PARAMS)], seed=17 + index // 6) for index in range(count)]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(3)
    model = GPT(GPTConfig(n_layer=1, n_head=1, dim=32, multiple_of=32, vocab_size=48, num_classes=2, grid=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model.eval()


Draw = Callable[..., dict[int, Tensor]]


def drawing(gpt: GPT, backend: str, padded: bool) -> Draw:
    """A function that draws the codes of some requests with one implementation; unwritten slots hold NaN."""
    weights = gpt.decode_weights(torch.float32)

    def draw(asked: Sequence[Request], *, limit: int, page_size: int, pages: int | None = None) -> dict[int, Tensor]:
        pages = pages or 2 * pages_for(BLOCK, page_size) * limit
        cache = KVCache(gpt.config, pages=pages, page_size=page_size, dtype=torch.float32, device=torch.device("cpu"))
        cache.k_LPSGD.fill_(float("nan"))
        cache.v_LPSGD.fill_(float("nan"))
        runner = (
            GraphRunner(weights, gpt.config, cache, limit, backend=backend)
            if padded
            else EagerRunner(weights, gpt.config, cache, backend)
        )
        loop = DecodeLoop(runner, limit)
        for request in asked:
            loop.submit(request)
        found = {done.request.index: done.wait() for done in loop.run()}
        assert loop.scheduler.allocator.free == pages
        return found

    return draw


class Implementation:
    """Draws 64 images together, and ``few`` of them in every other way: one after the other, to begin with."""

    def __init__(self, draw: Draw, few: int) -> None:
        self.draw, self.all, self.few = draw, requests(64), requests(few)
        self.alone = draw(self.few, limit=1, page_size=16)

    def check(self, found: dict[int, Tensor]) -> None:
        for index, codes_T in self.alone.items():
            assert torch.equal(codes_T, found[index]), index


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("reference", False, 64), id="reference"),
        pytest.param(("reference", True, 64), id="reference-padded"),
        pytest.param(("triton", True, 6), id="triton-padded", marks=pytest.mark.interpreted),
    ],
)
def implementation(gpt: GPT, request: pytest.FixtureRequest) -> Implementation:
    backend, padded, few = request.param
    return Implementation(drawing(gpt, backend, padded), few)


def test_sixty_four_together(implementation: Implementation) -> None:
    found = implementation.draw(implementation.all, limit=64, page_size=16)
    assert len({tuple(codes_T.tolist()) for codes_T in found.values()}) > 30, "equal images would show nothing"
    implementation.check(found)


@pytest.mark.parametrize("limit", [3, 8])
def test_batch_limits(implementation: Implementation, limit: int) -> None:
    implementation.check(implementation.draw(implementation.few, limit=limit, page_size=16))


@pytest.mark.parametrize("page_size", [64, 256, 1024])
def test_page_sizes(implementation: Implementation, page_size: int) -> None:
    implementation.check(implementation.draw(implementation.few, limit=5, page_size=page_size))


def test_order_and_a_pool_too_small_for_all(implementation: Implementation) -> None:
    """Pages of 2 slots: a guided pair takes 4 of the 7 pages, so images wait and meet at different positions."""
    shuffled = random.Random(5).sample(implementation.few, len(implementation.few))
    implementation.check(implementation.draw(shuffled, limit=8, page_size=2, pages=7))
