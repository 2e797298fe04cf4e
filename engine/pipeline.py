"""From codes to images, beside the decode loop: it never waits for the decoder, a digest or a disk.

Finished images go to one thread that decodes them (on a GPU in a stream of its own, between the steps of the loop) and
from there to worker threads that digest their pixels and call ``finish``, which saves a PNG. Results come back in the
order in which the images were finished, however long each took. On a CPU all of it happens between the loop's steps.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from retinar.engine import images, provenance
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
    image depend on no other.
    """

    def __init__(
        self, decoder: ImageDecoder, origin: provenance.Origin, grid: int, device: torch.device, batch: int = 1
    ) -> None:
        self.decoder, self.origin, self.grid, self.device, self.batch = decoder, origin, grid, device, batch
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

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

    On a CPU a step and the decoder each use all cores: side by side their thread pools get in each other's way (a tenth
    to a half slower on two cores).
    """
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def develop(
    steps: Steps,
    developer: Developer,
    finish: Callable[[Sampled], T],
    *,
    backlog: int,
    workers: int,
) -> Generator[T, None, None]:
    """``finish(sampled)`` of each image that ``steps`` yields, in that order.

    ``steps`` advances in the caller's thread whenever a result is asked for and none is there. At most ``backlog``
    images (but at least one group) wait between it and the caller; then it pauses until the first of them is finished.
    ``workers`` threads call ``finish``; with 0 the caller's does, and decodes as well. Errors of any part are raised
    here as they are, in the image's turn. Closing the iterator, or an error, ends the threads after what they are just
    doing and drops what waits.
    """
    with closing(steps):  # an error's traceback would keep it alive, with its progress bar
        if workers:
            yield from _beside(steps, developer, finish, backlog, workers)
            return
        for step in steps:
            for group in developer.groups(step):
                for image in developer.develop(group):
                    yield finish(developer.describe(image))


def _beside(
    steps: Steps,
    developer: Developer,
    finish: Callable[[Sampled], T],
    backlog: int,
    workers: int,
) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    decoder = ThreadPoolExecutor(1, thread_name_prefix="retinar-decode")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="retinar-finish")

    def complete(developed: Future[list[Developed]], place: int) -> T:
        return finish(developer.describe(developed.result()[place]))  # both queues are in order: nobody waits in vain

    try:
        for step in steps:
            for group in developer.groups(step):
                while waiting and len(waiting) + len(group) > backlog:
                    yield waiting.popleft().result()
                developed = decoder.submit(developer.develop, group)
                waiting.extend(pool.submit(complete, developed, place) for place in range(len(group)))
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # the decoder first: a worker may be waiting for a group that is cancelled now
        decoder.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=True, cancel_futures=True)
        decoder.shutdown(wait=True)
