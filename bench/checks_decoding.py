"""Do the runner's graphs draw the codes that they should? Against the step called directly, and against themselves.

Ours promise it bit by bit: padding, replay, page size and whatever else is in a batch must not change a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from retinar.engine.config import GPTConfig, gpt_config
from retinar.engine.graphs import GraphRunner
from retinar.engine.kv_cache import KVCache, pages_for
from retinar.engine.model import GPT
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.runner import DecodeLoop, EagerRunner, Runner
from retinar.kernels import ops

PARAMS = (
    SamplingParams(cfg_scale=2.0),
    SamplingParams(cfg_scale=4.0, temperature=0.8, top_p=0.9, cfg_interval=3),
    SamplingParams(cfg_scale=1.0, top_k=20),
)


@dataclass(frozen=True)
class Size:
    """A small model, and how many images are drawn together: on a GPU more rows than one block of products."""

    config: GPTConfig
    images: int
    together: int


def size_of(device: str) -> Size:
    """On a CPU the kernels are interpreted, a second a step."""
    small = {"n_layer": 1, "n_head": 1, "dim": 32, "multiple_of": 32, "vocab_size": 48, "grid": 2, "num_classes": 2}
    large = {"n_layer": 3, "n_head": 4, "dim": 256, "multiple_of": 256, "vocab_size": 1024, "grid": 7, "num_classes": 2}
    cuda = device == "cuda"
    return Size(gpt_config("GPT-tiny", **(large if cuda else small)), 7 if cuda else 3, 70 if cuda else 5)


class Checked:
    """The model's weights on a device, and ways to draw codes with them."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.size = torch.device(device), dtype, size_of(device)
        torch.manual_seed(5)
        gpt = GPT(self.size.config)
        with torch.no_grad():
            for name, parameter in gpt.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0, 0.1)
        self.weights = gpt.to(self.device).decode_weights(dtype)

    def requests(self, count: int) -> list[Request]:
        return [make_request(index, index % 2, PARAMS[index % 3], seed=9) for index in range(count)]

    def cache(self, images: int, page_size: int) -> KVCache:
        pages = 2 * images * pages_for(self.size.config.block_size, page_size)
        return KVCache(self.size.config, pages=pages, page_size=page_size, dtype=self.dtype, device=self.device)

    def graphs(self, images: int, page_size: int = 16) -> Runner:
        cache = self.cache(images, page_size)
        return GraphRunner(self.weights, self.size.config, cache, images, backend="triton", batch_invariant=True)

    def eager(self, images: int) -> Runner:
        return EagerRunner(self.weights, self.size.config, self.cache(images, 16), "triton")


def draw(runner: Runner, images: int, requests: Sequence[Request]) -> dict[int, Tensor]:
    """Codes on the CPU by image index."""
    loop = DecodeLoop(runner, images)
    for request in requests:
        loop.submit(request)
    return {done.request.index: done.wait().cpu() for done in loop.run()}


def _differing(what: str, found: dict[int, Tensor], expected: dict[int, Tensor]) -> str | None:
    wrong = [index for index, codes_T in expected.items() if not torch.equal(found[index], codes_T)]
    return (
        f"{what}: the codes of {len(wrong)} of {len(expected)} images differ, the first of them {wrong[0]}"
        if wrong
        else None
    )


def replay(device: str, dtype: torch.dtype) -> str | None:
    """Graphs of padded steps, with fewer places than images and then again, against the unpadded steps."""
    checked = Checked(device, dtype)
    count = checked.size.images
    requests, places = checked.requests(count), count - 2
    expected = draw(checked.eager(count), count, requests)
    runner = checked.graphs(places)
    for turn in ("at first", "when replayed"):
        wrong = _differing(
            f"graphs of steps, {turn}, against the steps themselves", draw(runner, places, requests), expected
        )
        if wrong is not None:
            return wrong
    return None


def invariance(device: str, dtype: torch.dtype) -> str | None:
    """One image alone is itself among many, with pages of another size."""
    checked = Checked(device, dtype)
    requests = checked.requests(checked.size.together)
    expected: dict[int, Tensor] = {}
    runner = checked.graphs(1)
    for request in requests[:: max(1, len(requests) // 3)]:
        expected |= draw(runner, 1, [request])
    for page_size in (16, 256):
        found = draw(checked.graphs(len(requests), page_size), len(requests), requests)
        wrong = _differing(f"batch invariance, pages of {page_size} slots", found, expected)
        if wrong is not None:
            return wrong
    return None


def jobs(device: str, dtype: torch.dtype) -> Iterator[Callable[[], str | None]]:
    """Both checks; where our kernels take the dtype."""
    assert ops.backends("decode_step")["triton"] is None
    yield partial(replay, device, dtype)
    yield partial(invariance, device, dtype)
