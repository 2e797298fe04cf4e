"""Padded steps and their graphs: the codes of the unpadded ones, captured once a bucket, never more than two ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retinar.engine import graphs
from retinar.engine.buckets import Bucket, bucket_of
from retinar.engine.config import GPTConfig
from retinar.engine.graphs import AHEAD, FEW_ROWS, GraphRunner, Step
from retinar.engine.kv_cache import KVCache
from retinar.engine.model import GPT
from retinar.engine.progress import SilentBar
from retinar.engine.request import SamplingParams, make_request
from retinar.engine.runner import DecodeLoop, EagerRunner
from retinar.kernels import ops

CPU = torch.device("cpu")
PARAMS = (
    SamplingParams(cfg_scale=1.5, cfg_interval=5, top_p=0.8),
    SamplingParams(),
    SamplingParams(cfg_scale=1.0),
    SamplingParams(cfg_scale=4.0, temperature=0.7, top_k=9),
)
REQUESTS = [make_request(index, index % 2, PARAMS[index % 4], seed=3) for index in range(7)]


def make_cache(config: GPTConfig, pages: int = 40, page_size: int = 16) -> KVCache:
    cache = KVCache(config, pages=pages, page_size=page_size, dtype=torch.float32, device=CPU)
    cache.k_LPSGD.fill_(float("nan"))
    cache.v_LPSGD.fill_(float("nan"))
    return cache


def make_runner(gpt: GPT, max_images: int = 5, backend: str | None = "reference", **options: Any) -> GraphRunner:
    weights = gpt.decode_weights(torch.float32)
    return GraphRunner(weights, gpt.config, make_cache(gpt.config), max_images, backend=backend, **options)


def codes_of(loop: DecodeLoop) -> dict[int, Tensor]:
    for request in REQUESTS:
        loop.submit(request)
    return {done.request.index: done.wait() for done in loop.run()}


@pytest.fixture(scope="module")
def expected(tiny_gpt: GPT) -> dict[int, Tensor]:
    weights = tiny_gpt.decode_weights(torch.float32)
    return codes_of(DecodeLoop(EagerRunner(weights, tiny_gpt.config, make_cache(tiny_gpt.config), "reference"), 2))


def assert_same(found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for index, codes_T in expected.items():
        assert torch.equal(found[index], codes_T), index


@pytest.mark.parametrize("max_images", [1, 3, 5])
def test_padding_changes_no_code(tiny_gpt: GPT, expected: dict[int, Tensor], max_images: int) -> None:
    """Three live images in a step of four or five, null rows that leave, one loop after another on one runner."""
    runner = make_runner(tiny_gpt)
    assert_same(codes_of(DecodeLoop(runner, max_images)), expected)
    assert_same(codes_of(DecodeLoop(runner, 5)), expected)
    assert runner.graph_bytes is None and runner.warm_up_seconds > 0


def test_logits_are_those_of_the_live_rows(tiny_gpt: GPT) -> None:
    runner, eager = make_runner(tiny_gpt), None
    loop = DecodeLoop(runner, 5)
    for request in REQUESTS[:3]:
        loop.submit(request)
    for _ in range(4):
        loop.step()
    eager = EagerRunner(runner.weights, tiny_gpt.config, make_cache(tiny_gpt.config), "reference")
    plain = DecodeLoop(eager, 3)
    for request in REQUESTS[:3]:
        plain.submit(request)
    for _ in range(4):
        plain.step()
    assert runner.logits_BV is not None and eager.logits_BV is not None
    assert runner.logits_BV.shape[0] == 5 and torch.equal(runner.logits_BV, eager.logits_BV)


def test_inputs_in_other_memory_are_refused(tiny_gpt: GPT) -> None:
    runner = make_runner(tiny_gpt)
    buffers = runner.buffers(5)
    with pytest.raises(ValueError, match="the front of this runner's own buffers, found other memory"):
        runner.step(ops.StepInputs(*(each.clone() for each in buffers)))
    with pytest.raises(ValueError, match="at most 5 images, found 6"):
        runner.buffers(6)


def test_a_new_loop_finds_padding_only(tiny_gpt: GPT) -> None:
    runner = make_runner(tiny_gpt)
    fresh = [each.clone() for each in runner.buffers(5)]
    loop = DecodeLoop(runner, 5)
    for request in REQUESTS:
        loop.submit(request)
    loop.step()
    assert all(torch.equal(one, other) for one, other in zip(runner.buffers(5), fresh, strict=True))


@pytest.mark.parametrize(
    ("options", "few", "many"),
    [
        ({"backend": None}, "triton", "blas"),
        ({"backend": None, "batch_invariant": True}, "triton", "triton"),
        ({"backend": "triton"}, "triton", "triton"),
    ],
)
def test_many_rows_are_multiplied_by_torch_unless_bits_must_hold(
    tiny_gpt: GPT, options: dict, few: str, many: str
) -> None:
    runner = make_runner(tiny_gpt, **options)
    assert runner._backend(Bucket(64, FEW_ROWS)) == few
    assert runner._backend(Bucket(65, FEW_ROWS + 1)) == many


class Card:
    """A made-up GPU. A graph's replay runs the captured step again and writes its results where they lay then."""

    def __init__(self, runner: GraphRunner) -> None:
        self.runner, self.run = runner, runner._run
        self.captured: list[Bucket] = []
        self.ran: list[Bucket] = []
        self.replayed: list[Bucket] = []
        self.pools: set[object] = set()
        self.capturing: Any = None
        self.queued = self.longest = 0
        self.free = 10_000
        self.streams: list[Any] = []
        self.workspaces = 0
        runner._run = self._run  # type: ignore[method-assign]
        runner.device = torch.device("cuda", 0)
        runner.graph_bytes = 0

    def _run(self, step: Step) -> Step:
        bucket = Bucket(len(step.inputs.cond_row_I), len(step.inputs.tokens_B))
        done = self.run(step)
        if self.capturing is None:
            self.ran.append(bucket)
            self.workspaces += 1
        else:
            self.capturing.step, self.capturing.bucket = done, bucket
        return done

    def replay(self, graph: Any) -> None:
        self.replayed.append(graph.bucket)
        again = self.run(graph.step)
        for old, new in ((graph.step.codes_I, again.codes_I), (graph.step.logits_BV, again.logits_BV)):
            old.copy_(new)
        self.queued += 1
        self.longest = max(self.longest, self.queued)

    @contextlib.contextmanager
    def capture(self, graph: Any, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert stream is self.streams[0] and len(self.streams) == 1, "memory is shared within one stream alone"
        assert self.workspaces == 0, "a workspace from outside would be baked into the graph"
        assert capture_error_mode == "thread_local", "a decoding thread that allocates would end the capture"
        self.pools.add(pool)
        self.capturing = graph
        yield
        self.workspaces += 1
        self.captured.append(graph.bucket)
        self.capturing = None
        self.free -= 100

    def new_stream(self) -> Any:
        self.streams.append(SimpleNamespace(wait_stream=lambda other: None))
        return self.streams[-1]

    def cleared(self) -> None:
        self.workspaces = 0

    def event_over(self) -> None:
        self.queued -= 1


@pytest.fixture
def card(tiny_gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card(make_runner(tiny_gpt))

    class Graph:
        def replay(self) -> None:
            made.replay(self)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graphs.torch._C, "_cuda_clearCublasWorkspaces", made.cleared, raising=False)
    stand_ins = {
        "CUDAGraph": Graph,
        "graph": made.capture,
        "graph_pool_handle": object,
        "Stream": made.new_stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda each: contextlib.nullcontext(),
        "device": lambda each: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (made.free, 0),
        "Event": lambda blocking: SimpleNamespace(record=lambda stream: None, synchronize=made.event_over),
    }
    for name, each in stand_ins.items():
        monkeypatch.setattr(graphs.torch.cuda, name, each)
    return made


def loop_of(card: Card, max_images: int) -> DecodeLoop:
    """The loop's own tensors lie on the CPU."""
    device, card.runner.device = card.runner.device, CPU
    loop = DecodeLoop(card.runner, max_images)
    loop.runner = SimpleNamespace(device=CPU, config=card.runner.config, step=card.runner.step)  # type: ignore[assignment]
    card.runner.device = device
    return loop


def test_one_graph_a_bucket_and_every_step_a_replay(card: Card, expected: dict[int, Tensor]) -> None:
    assert_same(codes_of(loop_of(card, 5)), expected)
    assert sorted(card.captured) == sorted(card.ran) == sorted(set(card.replayed))  # run once, captured once
    assert len(card.pools) == 1
    assert card.runner.graph_bytes == 100 * len(card.captured)
    before = len(card.replayed)
    assert_same(codes_of(loop_of(card, 5)), expected)
    assert len(card.replayed) == 2 * before and len(card.captured) == len(set(card.captured))


def test_the_host_is_never_more_than_two_steps_ahead(card: Card) -> None:
    codes_of(loop_of(card, 5))
    assert card.longest == AHEAD + 1 and card.queued == AHEAD


def test_warm_up_prepares_the_largest_first_and_shows_it(card: Card) -> None:
    bars: list[SilentBar] = []

    def progress(label: str, total: int | None) -> SilentBar:
        bars.append(SilentBar(label, total))
        return bars[-1]

    wanted = {bucket_of(images, rows, 5) for images in range(1, 6) for rows in range(images, 2 * images + 1)}
    card.runner.warm_up(wanted, progress)
    assert set(card.captured) == wanted and card.captured[0] == Bucket(5, 10)
    assert [each.rows for each in card.captured] == sorted((each.rows for each in wanted), reverse=True)
    assert [(bar.label, bar.done, bar.total) for bar in bars] == [("preparing steps", len(wanted), len(wanted))]
    card.runner.warm_up(wanted, progress)
    assert len(bars) == 1, "what is prepared is not prepared again"
    codes_of(loop_of(card, 5))
    assert len(card.captured) == len(wanted)


def test_a_step_may_be_prepared_in_the_middle(card: Card, expected: dict[int, Tensor]) -> None:
    """Running a step once before its capture must not disturb the images that are under way."""
    loop = loop_of(card, 5)
    found = {}
    for request in REQUESTS:  # arrivals one by one: ever larger buckets
        loop.submit(request)
        for _ in range(3):
            found |= {done.request.index: done.wait() for done in loop.step()}
    found |= {done.request.index: done.wait() for done in loop.run()}
    assert_same(found, expected)
    assert bucket_of(1, 2, 5) in card.captured and len(card.captured) > 3


def test_the_stand_ins_take_what_torch_takes() -> None:
    import inspect

    parameters = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "stream", "capture_error_mode"} <= set(parameters)
    assert "blocking" in inspect.signature(torch.cuda.Event.__new__).parameters
