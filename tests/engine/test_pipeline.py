"""Developing beside the decode loop: order, errors, a bounded backlog, threads that end, and the bits of one thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retinar.engine import pipeline
from retinar.engine.errors import InputError
from retinar.engine.pipeline import DECODE_BATCH, Developed, Developer, Sampled, Steps, default_workers, develop
from retinar.engine.request import SamplingParams, make_request
from retinar.engine.runner import Finished
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer

CPU = torch.device("cpu")


def finished(index: int) -> Finished:
    return Finished(index, make_request(index, 0, SamplingParams()), torch.full((4,), index))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("retinar-")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert threads() == []


class Steps_:
    """A decode loop: so many images a step. Notes what it was asked for, and that it was closed."""

    def __init__(self, *sizes: int, at_step: Callable[[int], None] = lambda step: None) -> None:
        self.sizes, self.at_step = sizes, at_step
        self.made, self.steps, self.closed = 0, 0, False

    def __call__(self) -> Steps:
        try:
            for size in self.sizes:
                self.at_step(self.steps)
                self.steps += 1
                self.made += size
                yield [finished(index) for index in range(self.made - size, self.made)]
        finally:
            self.closed = True


class Fake(Developer):
    """A decoder that does nothing, and remembers in which groups and threads."""

    def __init__(self, batch: int = 1, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.batch, self.fail_at, self.error = batch, fail_at, error
        self.decoded: list[list[int]] = []
        self.names: set[str] = set()

    def develop(self, group: Sequence[Finished]) -> list[Developed]:
        self.names.add(threading.current_thread().name)
        self.decoded.append([each.request.index for each in group])
        if self.error is not None and self.fail_at in self.decoded[-1]:
            raise self.error
        return [Developed(each.request, each.wait(), np.zeros((1, 1, 3), np.uint8)) for each in group]

    def describe(self, image: Developed) -> Sampled:
        return Sampled(*image, {})


def index_of(sampled: Sampled) -> int:
    return sampled.request.index


def run(loop: Steps_, developer: Developer, finish: Callable[[Sampled], Any], **settings: int) -> Iterator[Any]:
    return develop(loop(), developer, finish, **({"backlog": 8, "workers": 3} | settings))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_the_order_of_the_loop(workers: int) -> None:
    def slow_first(sampled: Sampled) -> int:
        time.sleep(0.02 if index_of(sampled) % 4 == 0 else 0)
        names.add(threading.current_thread().name)
        return index_of(sampled)

    names: set[str] = set()
    developer = Fake(batch=2)
    loop = Steps_(0, 3, 1, 0, 0, 5, 0, 2)
    assert list(run(loop, developer, slow_first, workers=workers)) == list(range(11))
    # groups are of one step, however the threads are timed
    assert developer.decoded == [[0, 1], [2], [3], [4, 5], [6, 7], [8], [9, 10]]
    if workers:
        assert len(developer.names) == 1 and developer.names.pop().startswith("retinar-decode")
        assert len(names) <= workers and all(name.startswith("retinar-finish") for name in names)
    else:
        assert names == developer.names == {threading.current_thread().name}


def test_the_loop_does_not_wait_for_an_image() -> None:
    last = threading.Event()
    loop = Steps_(1, 1, 0, 0, 1, at_step=lambda step: last.set() if step == 4 else None)

    def finish(sampled: Sampled) -> bool:
        return last.wait(20)  # the first image is not finished before the last step was asked for

    assert list(run(loop, Fake(), finish)) == [True] * 3


def test_an_image_does_not_wait_for_the_next() -> None:
    loop = Steps_(1, *[0] * 100_000, at_step=lambda step: time.sleep(0.0005))
    results = run(loop, Fake(), index_of)
    assert next(results) == 0 and loop.steps < 50_000
    results.close()  # type: ignore[attr-defined]
    assert loop.closed


def test_the_host_waits_for_the_codes_in_the_decoders_thread() -> None:
    class Event:
        def synchronize(self) -> None:
            waited.append(threading.current_thread().name)

    waited: list[str] = []
    image = finished(0)._replace(ready=Event())  # type: ignore[arg-type]
    assert list(develop((step for step in [[image]]), Fake(), index_of, backlog=1, workers=1)) == [0]
    assert len(waited) == 1 and waited[0].startswith("retinar-decode")


@pytest.mark.parametrize(("sizes", "backlog", "bound"), [((1,) * 30, 4, 4), ((3,) * 10, 5, 5), ((6,) * 5, 2, 6)])
def test_the_backlog_is_bounded_and_used(sizes: tuple[int, ...], backlog: int, bound: int) -> None:
    def finish(sampled: Sampled) -> int:
        time.sleep(0.004)
        done.append(index_of(sampled))
        return index_of(sampled)

    done: list[int] = []
    unfinished: list[int] = []
    loop = Steps_(*sizes, 0, at_step=lambda step: unfinished.append(loop.made - len(done)))
    assert list(run(loop, Fake(batch=sizes[0]), finish, backlog=backlog, workers=1)) == list(range(sum(sizes)))
    # never more (a group larger than the backlog is taken alone), and the loop does run ahead
    assert max(unfinished) <= bound and max(unfinished) >= min(2, bound)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("stage", ["steps", "decode", "finish"])
@pytest.mark.parametrize("error", [InputError("one sentence"), OSError(28, "No space left on device"), KeyError("x")])
def test_errors_of_every_stage_are_the_callers(stage: str, error: Exception, workers: int) -> None:
    def failing_step(step: int) -> None:
        if stage == "steps" and step == 6:
            raise error

    def finish(sampled: Sampled) -> int:
        time.sleep(0.003)
        if stage == "finish" and index_of(sampled) == 4:
            raise error
        return index_of(sampled)

    loop = Steps_(*[1] * 60, at_step=failing_step)
    developer = Fake(fail_at=4, error=error if stage == "decode" else None)
    seen: list[int] = []
    with pytest.raises(type(error)) as caught:
        for index in run(loop, developer, finish, workers=workers):
            seen.append(index)
    assert caught.value is error and loop.closed and loop.steps < 30
    assert seen == list(range(len(seen))) and (stage == "steps" or seen == [0, 1, 2, 3])
    assert threads() == []  # while the error, and so the frames it names, is still there


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", ["break", "interrupt", "close"])
def test_leaving_early_ends_the_threads_and_drops_what_waits(way: str, workers: int) -> None:
    def finish(sampled: Sampled) -> int:
        time.sleep(0.02)
        done.append(index_of(sampled))
        return index_of(sampled)

    done: list[int] = []
    loop = Steps_(40, 40, 40)
    results = run(loop, Fake(batch=8), finish, workers=workers, backlog=100)
    seen: list[int] = []

    def consume(results: Iterator[int]) -> None:
        for index in results:
            seen.append(index)
            if way == "interrupt" and index == 3:
                raise KeyboardInterrupt
            if index == 3:
                break

    began = time.monotonic()
    if way == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            consume(results)
    else:
        consume(results)
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 1.0  # all of them would take 1.2 s and more
    assert threads() == [] and loop.closed
    assert seen == [0, 1, 2, 3] and set(seen) <= set(done) and len(done) < 40
    after = len(done)
    time.sleep(0.05)
    assert len(done) == after


def test_a_worker_that_waits_for_a_dropped_group_does_not_hang() -> None:
    release = threading.Event()

    class Stuck(Fake):
        def develop(self, group: Sequence[Finished]) -> list[Developed]:
            release.wait(20)
            return super().develop(group)

    def at_step(step: int) -> None:
        if step == 20:
            threading.Timer(0.1, release.set).start()
            raise KeyboardInterrupt  # twenty groups wait, and workers for them

    developer = Stuck()
    with pytest.raises(KeyboardInterrupt):
        list(run(Steps_(*[1] * 30, at_step=at_step), developer, index_of, backlog=30))
    assert threads() == [] and developer.decoded == [[0]]


# --- with a real decoder ---------------------------------------------------------------------------------------------


class Spy(torch.nn.Module):
    """A tokenizer that notes how many images it is given at a time."""

    def __init__(self, tokenizer: VQTokenizer) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, tokenizer.config
        self.sizes: list[int] = []
        self.gradients: set[bool] = set()

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        self.sizes.append(codes_Bhw.shape[0])
        self.gradients.add(torch.is_grad_enabled())
        return self.tokenizer.decode(codes_Bhw)


def test_threads_change_no_bit(tiny_sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = tiny_sampler.requests([0, 1] * 6, SamplingParams(), seed=4)
    made: dict[int, list[Sampled]] = {}
    for workers in (0, 1, 4):
        monkeypatch.setattr("retinar.engine.sampler.default_workers", lambda device, workers=workers: workers)
        made[workers] = list(tiny_sampler.sample(requests, max_images=5))
    for workers in (1, 4):
        for one, other in zip(made[0], made[workers], strict=True):
            assert one.request == other.request and one.fields == other.fields
            assert torch.equal(one.codes_T, other.codes_T) and np.array_equal(one.pixels_HWC, other.pixels_HWC)
            other.codes_T[0] = 0  # an ordinary tensor of the caller's


def test_images_are_decoded_together_only_when_allowed(tiny_sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny_sampler.tokenizer is not None
    spy = tiny_sampler.tokenizer = Spy(tiny_sampler.tokenizer)  # type: ignore[assignment]
    monkeypatch.setattr("retinar.engine.sampler.default_workers", lambda device: 2)
    requests = tiny_sampler.requests([0, 1] * 5, SamplingParams())
    assert tiny_sampler.batch_invariant  # on a CPU, asked for or not
    alone = list(tiny_sampler.sample(requests, max_images=10))
    assert spy.sizes == [1] * 10 and spy.gradients == {False}

    spy.sizes.clear()
    tiny_sampler.batch_invariant = False
    together = list(tiny_sampler.sample(requests, max_images=10))
    assert spy.sizes == [DECODE_BATCH, 10 - DECODE_BATCH]
    for one, other in zip(alone, together, strict=True):
        assert one.request == other.request and torch.equal(one.codes_T, other.codes_T)
        # the order of sums may differ, the image may not
        assert np.abs(one.pixels_HWC.astype(int) - other.pixels_HWC.astype(int)).max() <= 1


def test_finish_is_called_with_the_whole_image(
    tiny_sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = tiny_sampler.requests([1, 0, 1], SamplingParams(), seed=2)
    plain = list(tiny_sampler.sample(requests))
    monkeypatch.setattr("retinar.engine.sampler.default_workers", lambda device: 2)
    kept = list(tiny_sampler.sample(requests, finish=lambda sampled: (index_of(sampled), dict(sampled.fields))))
    assert kept == [(index_of(sampled), sampled.fields) for sampled in plain]


def test_the_backlog_follows_the_number_of_images(tiny_sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, int]] = []

    def spy(steps: Steps, developer: Developer, finish: Any, **settings: int) -> Iterator[Any]:
        given.append(settings)
        return develop(steps, developer, finish, **settings)

    monkeypatch.setattr("retinar.engine.sampler.develop", spy)
    requests = tiny_sampler.requests([0] * 3, SamplingParams())
    list(tiny_sampler.sample(requests, max_images=2))
    list(tiny_sampler.sample(requests))
    assert given == [{"backlog": 2 * pipeline.WAVES, "workers": 0}, {"backlog": 16 * pipeline.WAVES, "workers": 0}]


def test_a_gpu_has_workers_and_a_cpu_none() -> None:
    assert default_workers(CPU) == 0 and 1 <= default_workers(torch.device("cuda")) <= 8
