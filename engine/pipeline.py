"""From codes to images, beside the decode loop: it never waits for the decoder, a digest or a disk.

Finished images go to one thread that decodes them (on a GPU in a stream of its own, between the steps of the loop) and
from there to worker threads that digest their pixels and call ``finish``, which saves a PNG. Results come back in the
order in which the images were finished, however long each took.

On a CPU the loop and the decoder want the same cores. There the decoding thread has the lowest priority: it takes what
the loop's steps leave, which is little. While the loop waits for a full backlog, and when it has ended, the caller's
thread decodes what nobody has begun, at its own priority: other processes would starve the lowest. Where single threads
have no priorities (all systems but Linux), images are decoded between the loop's steps.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from retinar.engine import images, provenance
from retinar.engine.progress import Progress, silent
from retinar.engine.request import Request
from retinar.engine.runner import Finished
from retinar.engine.vq_decoder import ImageDecoder

T = TypeVar("T")
Steps = Generator[Sequence[Finished], None, None]
"""The images that each step finished, mostly none."""

#: Images that a GPU's decoder takes together: 256 px, 128 channels and fp32 are 34 MB an image and activation.
DECODE_BATCH = 8
#: Times ``max_images`` that may wait before the decode loop pauses. Images admitted together finish in one step: one
#: such wave is being developed while the next arrives, and two more cover a disk that stalls. A waiting image holds
#: some 200 kB.
WAVES = 4
#: Of Linux: the loop's threads get 68 times as much of a core that both want.
LOWEST_PRIORITY = 19


class Sampled(NamedTuple):
    """A finished image: pixels uint8 [H, W, 3], codes int64 [block_size] on the CPU, and its text fields."""

    request: Request
    codes_T: Tensor
    pixels_HWC: np.ndarray
    fields: dict[str, str]


class Developed(NamedTuple):
    """A decoded image before its provenance is written: as `Sampled`."""

    request: Request
    codes_T: Tensor
    pixels_HWC: np.ndarray


class Developer:
    """A decoder (the tokenizer, or a prepared copy of its decoder), and the origin that all its images share.

    ``grid`` codes a side; up to ``batch`` images of one step are decoded together. With a batch of 1 the bits of an
    image depend on no other. ``stream``: of a GPU, to work in beside the loop.
    """

    def __init__(
        self,
        decoder: ImageDecoder,
        origin: provenance.Origin,
        grid: int,
        device: torch.device,
        batch: int = 1,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.decoder, self.origin, self.grid, self.device, self.batch = decoder, origin, grid, device, batch
        self._stream = stream

    @torch.no_grad()  # a thread's own mode: the caller's does not reach it
    def decode(self, codes_BT: Tensor) -> np.ndarray:
        """Codes int64 [B, block_size] as pixels uint8 [B, H, W, 3] on the host: one batch, in the current stream."""
        codes_Bhw = codes_BT.to(self.device).view(-1, self.grid, self.grid)
        # fp32 is fp32, and the algorithm depends on shapes alone. The flags are the process's: nobody else convolves.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return images.to_bytes(self.decoder.decode(codes_Bhw))

    def groups(self, finished: Sequence[Finished]) -> Iterator[Sequence[Finished]]:
        """The batches of a step's images. Of one step only, so that they do not depend on the clock."""
        return (finished[start : start + self.batch] for start in range(0, len(finished), self.batch))

    def develop(self, group: Sequence[Finished]) -> list[Developed]:
        """Wait for the codes of a group, decode them together, bring codes and pixels to the host."""
        with self._aside():
            codes_BT = torch.stack([finished.wait() for finished in group])
            pixels_BHWC = self.decode(codes_BT)
            return [
                Developed(finished.request, codes_T, pixels_HWC)
                for finished, codes_T, pixels_HWC in zip(group, codes_BT.cpu().unbind(), pixels_BHWC, strict=True)
            ]

    def describe(self, image: Developed) -> Sampled:
        """Write down where an image came from."""
        return Sampled(*image, provenance.describe(self.origin, *image))

    def _aside(self) -> AbstractContextManager[object]:
        # Codes were drawn in the loop's stream, and the host has waited for them. The reverse needs no event: codes and
        # pixels are on the host, which waits for that, before anything is freed.
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def default_workers(device: torch.device) -> int:
    """Threads that finish images beside a loop on ``device``; 0: everything happens in the loop's own.

    That is where a CPU's threads have no priorities of their own: the decoder would take the cores from the steps.
    """
    return min(8, os.cpu_count() or 1) if device.type != "cpu" or sys.platform == "linux" else 0


def develop(
    steps: Steps,
    developer: Developer,
    finish: Callable[[Sampled], T],
    *,
    backlog: int,
    workers: int,
    low: bool = False,
    progress: Progress = silent,
) -> Generator[T, None, None]:
    """``finish(sampled)`` of each image that ``steps`` yields, in that order.

    ``steps`` advances in the caller's thread whenever a result is asked for and none is there. At most ``backlog``
    images (but at least one group) wait between it and the caller; then it pauses until the first of them is finished.
    ``workers`` threads call ``finish``; with 0 the caller's does, and decodes as well. Errors of any part are raised
    here as they are, in the image's turn. Closing the iterator, or an error, ends the threads after what they are just
    doing and drops what waits.

    ``low``: loop and decoder share cores (above); ``progress`` then shows what is left when the loop has ended.
    """
    with closing(steps):  # an error's traceback would keep it alive, with its progress bar
        if workers:
            yield from _beside(steps, developer, finish, backlog, workers, low, progress)
            return
        for step in steps:
            for group in developer.groups(step):
                for image in developer.develop(group):
                    yield finish(developer.describe(image))


class Line:
    """Groups in line to be developed, in their order: by a thread of its own, or one by a caller who waits for it.

    ``low``: that thread has the lowest priority, and begins nothing while the line is held.
    """

    def __init__(self, developer: Developer, low: bool) -> None:
        self.developer, self.low = developer, low
        self._groups: deque[tuple[Sequence[Finished], Future[list[Developed]]]] = deque()
        self._lock, self._free = threading.Lock(), threading.Event()
        # pixels depend on the number of torch's threads, and every thread has its own
        start = partial(_step_back, torch.get_num_threads()) if low else None
        self._thread = ThreadPoolExecutor(1, "retinar-decode", start)

    def add(self, group: Sequence[Finished]) -> Future[list[Developed]]:
        """To the end of the line."""
        developed: Future[list[Developed]] = Future()
        self._groups.append((group, developed))
        self._thread.submit(self._when_free)
        return developed

    def hasten(self, developed: Future[list[Developed]]) -> None:
        """Develop this group here and now, if it is the first in the line."""
        self._develop(developed)

    def hold(self) -> None:
        """Until `release` the thread begins nothing new."""
        if self.low:
            self._free.clear()

    def release(self) -> None:
        """Let the thread go on."""
        self._free.set()

    def close(self, wait: bool) -> None:
        """Drop what nobody has begun; ``wait`` for what the thread has."""
        with self._lock:
            for _, developed in self._groups:
                developed.cancel()
            self._groups.clear()
        self._free.set()
        self._thread.shutdown(wait, cancel_futures=True)

    def _when_free(self) -> None:
        self._free.wait()
        self._develop()

    def _develop(self, only: Future[list[Developed]] | None = None) -> None:
        """The first group in the line, or ``only`` this if it is the first."""
        with self._lock:
            if not self._groups or (only is not None and self._groups[0][1] is not only):
                return
            group, developed = self._groups.popleft()
        try:
            developed.set_result(self.developer.develop(group))
        except BaseException as error:  # Ctrl-C too: the caller, who waits for this group, gets it
            developed.set_exception(error)


def _step_back(threads: int) -> None:
    """Give this thread the lowest priority: torch's threads, which it has yet to start, inherit it."""
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    torch.set_num_threads(threads)


def _beside(
    steps: Steps,
    developer: Developer,
    finish: Callable[[Sampled], T],
    backlog: int,
    workers: int,
    low: bool,
    progress: Progress,
) -> Iterator[T]:
    waiting: deque[tuple[Future[list[Developed]], Future[T]]] = deque()
    line = Line(developer, low)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="retinar-finish")

    def complete(developed: Future[list[Developed]], place: int) -> T:
        return finish(developer.describe(developed.result()[place]))  # both queues are in order: nobody waits in vain

    def first() -> T:
        developed, result = waiting.popleft()
        if low:
            line.hasten(developed)
        return result.result()

    try:
        for step in steps:
            line.release()
            if step:
                line.hold()  # until the next step: then the loop is still there to be left alone
            for group in developer.groups(step):
                while waiting and len(waiting) + len(group) > backlog:
                    yield first()
                developed = line.add(group)
                waiting.extend((developed, pool.submit(complete, developed, place)) for place in range(len(group)))
            while waiting and waiting[0][1].done():
                yield waiting.popleft()[1].result()
        line.hold()
        if waiting:
            with progress("decoding images", len(waiting)) if low else silent("") as bar:
                while waiting:
                    yield first()
                    bar.advance()
    finally:
        # the decoder first: a worker may be waiting for a group that is dropped now
        line.close(wait=False)
        pool.shutdown(wait=True, cancel_futures=True)
        line.close(wait=True)
