"""Developing beside the decode loop: order, errors, a bounded backlog, threads that end, and the bits of one thread; on
a CPU, steps that go on while an image is being decoded.
"""

from __future__ import annotations

import os
import sys
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
from retinar.engine.config import tokenizer_config
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.pipeline import DECODE_BATCH, Developed, Developer, Sampled, Steps, default_workers, develop
from retinar.engine.progress import SilentBar
from retinar.engine.provenance import Origin
from retinar.engine.request import SamplingParams, make_request
from retinar.engine.runner import Finished
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.vq_decoder import BFloat16Decoder

CPU = torch.device("cpu")
MAIN = threading.main_thread().name
WAYS = [(0, False), (3, False), (3, True)]
"""Workers and ``low``: in turn, as on a GPU, as on a CPU."""

only_on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities for single threads")


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


def run(loop: Steps_, developer: Developer, finish: Callable[[Sampled], Any], **settings: Any) -> Iterator[Any]:
    return develop(loop(), developer, finish, **({"backlog": 8, "workers": 3} | settings))


@pytest.mark.parametrize(("workers", "low"), [*WAYS, (1, False), (1, True)])
def test_results_come_in_the_order_of_the_loop(workers: int, low: bool) -> None:
    def slow_first(sampled: Sampled) -> int:
        time.sleep(0.02 if index_of(sampled) % 4 == 0 else 0)
        names.add(threading.current_thread().name)
        return index_of(sampled)

    names: set[str] = set()
    developer = Fake(batch=2)
    loop = Steps_(0, 3, 1, 0, 0, 5, 0, 2)
    assert list(run(loop, developer, slow_first, workers=workers, low=low)) == list(range(11))
    # groups are of one step, however the threads are timed
    assert developer.decoded == [[0, 1], [2], [3], [4, 5], [6, 7], [8], [9, 10]]
    if workers:
        others = developer.names - {MAIN} if low else developer.names  # the caller, too, where it would only wait
        assert (low or others) and all(name.startswith("retinar-decode_0") for name in others)
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


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("sizes", "backlog", "bound"), [((1,) * 30, 4, 4), ((3,) * 10, 5, 5), ((6,) * 5, 2, 6)])
def test_the_backlog_is_bounded_and_used(sizes: tuple[int, ...], backlog: int, bound: int, low: bool) -> None:
    def finish(sampled: Sampled) -> int:
        time.sleep(0.004)
        done.append(index_of(sampled))
        return index_of(sampled)

    done: list[int] = []
    unfinished: list[int] = []
    loop = Steps_(*sizes, 0, at_step=lambda step: unfinished.append(loop.made - len(done)))
    results = run(loop, Fake(batch=sizes[0]), finish, backlog=backlog, workers=1, low=low)
    assert list(results) == list(range(sum(sizes)))
    # never more (a group larger than the backlog is taken alone), and the loop does run ahead
    assert max(unfinished) <= bound and max(unfinished) >= min(2, bound)


@pytest.mark.parametrize(("workers", "low"), WAYS)
@pytest.mark.parametrize("stage", ["steps", "decode", "finish"])
@pytest.mark.parametrize("error", [InputError("one sentence"), OSError(28, "No space left on device"), KeyError("x")])
def test_errors_of_every_stage_are_the_callers(stage: str, error: Exception, workers: int, low: bool) -> None:
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
        for index in run(loop, developer, finish, workers=workers, low=low):
            seen.append(index)
    assert caught.value is error and loop.closed and loop.steps < 30
    assert seen == list(range(len(seen))) and (stage == "steps" or seen == [0, 1, 2, 3])
    assert threads() == []  # while the error, and so the frames it names, is still there


@pytest.mark.parametrize(("workers", "low"), WAYS)
@pytest.mark.parametrize("way", ["break", "interrupt", "close"])
def test_leaving_early_ends_the_threads_and_drops_what_waits(way: str, workers: int, low: bool) -> None:
    def finish(sampled: Sampled) -> int:
        time.sleep(0.02)
        done.append(index_of(sampled))
        return index_of(sampled)

    done: list[int] = []
    loop = Steps_(40, 40, 40)
    results = run(loop, Fake(batch=8), finish, workers=workers, low=low, backlog=100)
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


@pytest.mark.parametrize("low", [False, True])
def test_a_worker_that_waits_for_a_dropped_group_does_not_hang(low: bool) -> None:
    begun, release = threading.Event(), threading.Event()

    class Stuck(Fake):
        def develop(self, group: Sequence[Finished]) -> list[Developed]:
            begun.set()
            release.wait(20)
            return super().develop(group)

    def at_step(step: int) -> None:
        if step == 20:
            assert begun.wait(20)
            threading.Timer(0.1, release.set).start()
            raise KeyboardInterrupt  # twenty groups wait, and workers for them

    developer = Stuck()
    with pytest.raises(KeyboardInterrupt):
        list(run(Steps_(*[1] * 30, at_step=at_step), developer, index_of, backlog=30, low=low))
    assert threads() == [] and developer.decoded == [[0]]


# --- a CPU's cores are shared -----------------------------------------------------------------------------------------


def aside(developer: Fake, *, images: int = 1, at_end: Callable[[], None] = lambda: None) -> Steps:
    """A loop that goes on until the decoding thread has begun its images."""
    yield [finished(index) for index in range(images)]
    deadline = time.monotonic() + 20
    while len(developer.decoded) < images and time.monotonic() < deadline:
        time.sleep(0.001)
        yield []
    at_end()


def test_what_the_loop_finished_last_is_decoded_by_the_caller() -> None:
    developer = Fake()
    assert list(run(Steps_(0, 4), developer, index_of, low=True)) == [0, 1, 2, 3]
    assert developer.names == {MAIN}  # and by nobody of low priority, whom others could starve


def test_what_the_loop_finished_before_is_decoded_beside_it() -> None:
    developer = Fake()
    assert list(develop(aside(developer, images=3), developer, index_of, backlog=4, workers=1, low=True)) == [0, 1, 2]
    assert len(developer.names) == 1 and developer.names.pop().startswith("retinar-decode")


def test_a_loop_that_pauses_decodes_what_nobody_has_begun() -> None:
    """The decoding thread is in the first image: the caller waits for that one, and takes the rest."""
    begun, release = threading.Event(), threading.Event()

    class Stuck(Fake):
        def develop(self, group: Sequence[Finished]) -> list[Developed]:
            if group[0].request.index == 0:
                begun.set()
                release.wait(20)
            who[group[0].request.index] = threading.current_thread().name
            return super().develop(group)

    def at_step(step: int) -> None:
        if step == 3:
            assert begun.wait(20)
            threading.Timer(0.05, release.set).start()

    who: dict[int, str] = {}
    assert list(run(Steps_(1, 0, 0, 3, at_step=at_step), Stuck(), index_of, backlog=2, low=True)) == [0, 1, 2, 3]
    assert list(who) == [0, 1, 2, 3]  # whose turn it is not would only keep the first image from its cores
    assert who.pop(0).startswith("retinar-decode") and who == {1: MAIN, 2: MAIN, 3: MAIN}


def test_ctrl_c_while_the_caller_decodes() -> None:
    developer = Fake(fail_at=1, error=KeyboardInterrupt())
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for index in run(Steps_(4), developer, index_of, low=True):
            seen.append(index)
    assert seen == [0] and developer.decoded == [[0], [1]] and threads() == []


def test_what_is_left_when_the_loop_has_ended_is_shown() -> None:
    bars: list[SilentBar] = []

    def progress(label: str, total: int | None) -> SilentBar:
        bars.append(SilentBar(label, total))
        return bars[-1]

    assert list(run(Steps_(1, 3, 0), Fake(), index_of, low=True, progress=progress)) == [0, 1, 2, 3]
    assert [bar.label for bar in bars] == ["decoding images"] and 1 <= bars[0].done == bars[0].total <= 4
    assert list(run(Steps_(0, 0), Fake(), index_of, low=True, progress=progress)) == [] and len(bars) == 1


def niceness(thread: int) -> int:
    with open(f"/proc/self/task/{thread}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[16])


def native_threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@only_on_linux
@pytest.mark.parametrize("count", [1, 3])
def test_the_decoding_thread_and_those_it_starts_have_the_lowest_priority(
    count: int, torch_threads: Callable[[int], None]
) -> None:
    class Parallel(Fake):
        def develop(self, group: Sequence[Finished]) -> list[Developed]:
            before = native_threads()
            torch.ones(4_000_000).mul_(2)
            named = {thread.native_id for thread in threading.enumerate()}
            team = native_threads() - before - named
            seen.update(own=niceness(threading.get_native_id()), team=[niceness(thread) for thread in team])
            seen.update(threads=torch.get_num_threads())
            return super().develop(group)

    torch_threads(count)
    main = niceness(threading.get_native_id())
    seen: dict[str, Any] = {}
    developer = Parallel()
    assert list(develop(aside(developer), developer, index_of, backlog=1, workers=1, low=True)) == [0]
    assert seen == {"own": 19, "team": [19] * (count - 1), "threads": count}
    assert niceness(threading.get_native_id()) == main


@only_on_linux
def test_where_priorities_are_forbidden_images_are_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        asked.append(True)
        raise PermissionError(1, "Operation not permitted")

    asked: list[bool] = []
    monkeypatch.setattr(os, "setpriority", forbidden)
    developer = Fake()
    assert list(develop(aside(developer), developer, index_of, backlog=1, workers=1, low=True)) == [0]
    assert asked == [True]


@only_on_linux
def test_steps_go_on_while_an_image_is_being_decoded_on_a_cpu(tiny_gpt: GPT, tiny_tokenizer: VQTokenizer) -> None:
    class Slow(Spy):
        """The first image takes as long as ten more steps."""

        def decode(self, codes_Bhw: Tensor) -> Tensor:
            if not begun.is_set():
                begun.set()
                waited.append(release.wait(20))
                names.append(threading.current_thread().name)
            return super().decode(codes_Bhw)

    class Bar(SilentBar):
        def advance(self, count: int = 1, note: str | None = None) -> None:
            super().advance(count, note)
            if self.label == "codes" and self.done > 36 + 1:  # of 36 in the first image, and a step later
                assert begun.wait(20)
                steps.append(self.done)
                if len(steps) == 10:
                    release.set()

    begun, release = threading.Event(), threading.Event()
    waited: list[bool] = []
    names: list[str] = []
    steps: list[int] = []
    sampler = Sampler(tiny_gpt, tiny_tokenizer, device="cpu")
    requests = sampler.requests([0, 1, 0], SamplingParams(), seed=6)
    expected = {sampled.request.index: sampled.pixels_HWC for sampled in sampler.sample(requests)}
    sampler.tokenizer = Slow(tiny_tokenizer)  # type: ignore[assignment]
    made = list(sampler.sample(requests, max_images=1, progress=Bar))
    assert waited == [True] and names[0].startswith("retinar-decode") and len(steps) > 10
    assert [sampled.request.index for sampled in made] == [0, 1, 2]
    assert all(np.array_equal(sampled.pixels_HWC, expected[sampled.request.index]) for sampled in made)


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


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_decoding_thread_makes_the_callers_bits(
    count: int, half: bool, torch_threads: Callable[[int], None]
) -> None:
    """Which depend on the number of torch's threads, above all in bfloat16."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(tokenizer_config("VQ-8", ch=32, image_size=64)).eval()

    class Real(Fake):
        def develop(self, group: Sequence[Finished]) -> list[Developed]:
            super().develop(group)
            return real.develop(group)

    torch_threads(count)
    decoder = BFloat16Decoder(tokenizer) if half else tokenizer
    real = Developer(decoder, Origin("", "", "", {}, (), 16384), 8, CPU)
    codes_T = torch.randint(16384, (64,))
    image = finished(0)._replace(codes_T=codes_T)

    def steps() -> Steps:
        yield [image]
        yield from aside(developer, images=0)
        deadline = time.monotonic() + 20
        while not developer.decoded and time.monotonic() < deadline:
            time.sleep(0.001)
            yield []

    developer = Real()
    [made] = develop(steps(), developer, lambda sampled: sampled.pixels_HWC, backlog=1, workers=1, low=True)
    assert developer.names.pop().startswith("retinar-decode")
    assert np.array_equal(made, real.decode(codes_T[None])[0])


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
    given: list[dict[str, Any]] = []

    def spy(steps: Steps, developer: Developer, finish: Any, **settings: Any) -> Iterator[Any]:
        given.append({name: settings[name] for name in ("backlog", "workers", "low")})
        return develop(steps, developer, finish, **settings)

    monkeypatch.setattr("retinar.engine.sampler.develop", spy)
    requests = tiny_sampler.requests([0] * 3, SamplingParams())
    list(tiny_sampler.sample(requests, max_images=2))
    list(tiny_sampler.sample(requests))
    same = {"workers": default_workers(CPU), "low": True}
    assert given == [{"backlog": 2 * pipeline.WAVES, **same}, {"backlog": 16 * pipeline.WAVES, **same}]


def test_a_cpu_has_workers_where_threads_have_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= default_workers(torch.device("cuda")) <= 8
    for platform, some in {"linux": True, "darwin": False, "win32": False}.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert (default_workers(CPU) > 0) == some and default_workers(torch.device("cuda")) > 0
