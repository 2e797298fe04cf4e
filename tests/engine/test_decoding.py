"""What is kept from one call to the next: a runner that has cost memory and a warm-up, and nothing of its last loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retinar.engine import decoding
from retinar.engine.decoding import Decoding
from retinar.engine.errors import InputError
from retinar.engine.graphs import GraphRunner
from retinar.engine.model import GPT
from retinar.engine.precision import PRECISIONS
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.runner import DecodeLoop, Runner

CPU = torch.device("cpu")


def requests(count: int, scale: float = 2.0) -> list[Request]:
    return [make_request(index, index % 2, SamplingParams(cfg_scale=scale), seed=3) for index in range(count)]


@pytest.fixture
def made(tiny_gpt: GPT) -> Decoding:
    return Decoding(tiny_gpt, CPU, PRECISIONS["float32"], "reference", batch_invariant=True)


def run(loop: DecodeLoop, asked: list[Request]) -> dict[int, list[int]]:
    for request in asked:
        loop.submit(request)
    return {done.request.index: done.wait().tolist() for done in loop.run()}


def after(made: Decoding, count: int, **limits: Any) -> Runner:
    loop = made.loop(requests(count), **limits)
    run(loop, requests(count))
    made.keep(loop)
    return loop.runner


def test_a_runner_serves_equal_and_smaller_calls(made: Decoding) -> None:
    first = after(made, 4, max_images=3, page_size=16)
    assert after(made, 4, max_images=3, page_size=16) is first
    assert after(made, 2, max_images=3, page_size=16) is first
    assert after(made, 5, max_images=5, page_size=16) is not first
    last = after(made, 3, max_images=3, page_size=4)
    assert last.cache.page_size == 4
    assert after(made, 3, max_images=3, page_size=4, pages=60).cache.pages == 60
    assert after(made, 3, max_images=3, page_size=4).cache.pages != 60, "pages that were asked for are no default"


def test_where_memory_is_short_it_is_kept_all_the_same(made: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "pool_pages", lambda wanted, least, *_: least + 1)
    first = after(made, 6, max_images=6, page_size=16)
    assert first.cache.pages == 7
    assert after(made, 6, max_images=6, page_size=16) is first


def test_two_loops_at_a_time_have_a_runner_each(made: Decoding) -> None:
    after(made, 2, max_images=2, page_size=16)
    one, other = (made.loop(requests(2), max_images=2, page_size=16) for _ in range(2))
    assert one.runner is not other.runner


@pytest.mark.parametrize("bad", [{"page_size": 0}, {"page_size": 3}, {"max_images": 0}, {"pages": 0}])
def test_a_refused_call_costs_nothing(made: Decoding, bad: dict[str, int]) -> None:
    limits = {"max_images": 2, "page_size": 16}
    first = after(made, 2, **limits)
    with pytest.raises(InputError, match="must be"):
        made.loop(requests(2), **(limits | bad))
    assert after(made, 2, **limits) is first


def test_steps_are_prepared_on_padding_not_on_what_the_last_loop_left(
    made: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket's first run reads its inputs: behind a finished loop they would point past the end of the cache."""
    seen: list[torch.Tensor] = []

    def prepare(self: GraphRunner, buckets: Any, progress: Any) -> None:
        seen.append(self._inputs.positions_B.clone())

    monkeypatch.setattr(Decoding, "graphs", True)
    monkeypatch.setattr(GraphRunner, "warm_up", prepare)
    for _ in range(2):
        after(made, 2, max_images=2, page_size=16)
    assert len(seen) == 2 and not any(each.any() for each in seen)
