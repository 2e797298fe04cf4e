"""The work of encoding: photographs -> views -> codes -> blocks, here or in several processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from retinar.engine.checkpoint import load_tokenizer
from retinar.engine.children import Child, reporting, stop, watch, without_interrupts
from retinar.engine.config import TokenizerConfig
from retinar.engine.errors import InputError
from retinar.engine.progress import Bar
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.code_writer import Blocks
from retinar.train.crops import to_tensor
from retinar.train.views import Pixels, Views

T = TypeVar("T")
GPU_ROWS = 16


class Photographs(Protocol):
    """What is encoded, as :class:`retinar.train.data.images.ImageSet` has it; it must pickle."""

    root: Path
    paths: list[Path]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Pixels: ...


@dataclass(frozen=True)
class Encoding:
    """All that a process needs to encode any of the blocks; it pickles. ``threads``: of a process."""

    images: Photographs
    tokenizer: Path
    config: TokenizerConfig
    views: Views
    blocks: Blocks
    threads: int

    def run(self, firsts: Sequence[int], device: torch.device, advance: Callable[[int], None]) -> None:
        """Encode and write these blocks; ``advance(images)`` after each. InputError for a photograph that cannot be
        read or blocks that cannot be written."""
        if not firsts:
            return
        model = load_tokenizer(self.tokenizer, self.config, device=device)
        on_cpu = device.type == "cpu"
        # On a CPU an image is a thread's work from the file to its codes; for a GPU threads read ahead.
        work: Callable[[int], NDArray[Any]] = self._codes_of(model) if on_cpu else self._views
        span = [index for first in firsts for index in self.blocks.span(first)]
        with lone_threads(self.threads) as pool, exact():
            ready = ahead(pool, work, span, 2 * self.threads + 8)
            for first in firsts:
                parts = np.stack([next(ready) for _ in self.blocks.span(first)])
                self._write(first, parts if on_cpu else encode_pixels(model, parts.reshape(-1, *parts.shape[2:])))
                advance(len(parts))

    def _write(self, first: int, codes: NDArray[np.uint16]) -> None:
        images = self.blocks.span(first)
        try:
            self.blocks.write(first, codes.reshape(len(images), len(self.views.names), -1), self.images.labels[images])
        except OSError as error:
            raise InputError(
                f"Expected to write codes in {self.blocks.path}, found {error}: make room or fix the disk, then run "
                "the same command again."
            ) from error

    def _views(self, index: int) -> Pixels:
        return self.views.of(self.images.load(index))

    def _codes_of(self, model: VQTokenizer) -> Callable[[int], NDArray[np.uint16]]:
        return lambda index: encode_pixels(model, self._views(index))


@torch.no_grad()
def encode_pixels(model: VQTokenizer, pixels_NHWC: Pixels) -> NDArray[np.uint16]:
    """uint8 [N, H, W, 3] -> codes uint16 [N, T].

    Convolutions may round differently for another number of images or threads, and a code near a boundary flips. So
    they always get the same number: one image on a CPU, in one thread (:func:`Encoding.run` has as many images under
    way as there are threads, which is faster too), and 16 on a GPU, the last ones padded, without TF32.
    """
    device = next(model.parameters()).device
    rows = 1 if device.type == "cpu" else GPU_ROWS
    found = []
    for first in range(0, len(pixels_NHWC), rows):
        part = pixels_NHWC[first : first + rows]
        padded = np.zeros((rows, *part.shape[1:]), np.uint8)
        padded[: len(part)] = part
        found.append(model.encode(to_tensor(padded).to(device))[: len(part)].flatten(1).cpu())
    return torch.cat(found).numpy().astype(np.uint16)


@contextmanager
def lone_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """``count`` threads, each of which computes alone: torch's own would make the rounding depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, "retinar-encode", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def exact() -> AbstractContextManager[object]:
    """Convolutions in fp32 that depend on shapes alone, while the block runs. Flags of the process, not of a thread."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def ahead(pool: ThreadPoolExecutor, work: Callable[[int], T], items: Iterable[int], most: int) -> Iterator[T]:
    """``work(item)`` of each, in order, with at most ``most`` of them begun and not taken."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# --- several processes on one machine, watched as those that share a folder of images


def run_in_processes(encoding: Encoding, firsts: Sequence[int], devices: Sequence[str], bar: Bar) -> None:
    """A process for each of ``devices`` (one may be named twice), each with a contiguous share of the blocks.

    An InputError of one is raised here, the death of one is an InputError; both, and Ctrl-C, stop the others.
    """
    children: list[Child] = []
    try:
        with without_interrupts():
            for device, share in zip(devices, shares(firsts, len(devices)), strict=True):
                if share:
                    children.append(Child(_work, device, encoding, share, device))
        bar.advance(0, f"in {len(children)} processes")
        watch(children, bar, len(encoding.images))
    finally:
        stop(children)


def shares(firsts: Sequence[int], parts: int) -> list[list[int]]:
    """Contiguous shares, the first ones at most one longer."""
    return [part.tolist() for part in np.array_split(np.asarray(firsts, np.int64), parts)]


def _work(line: Connection, encoding: Encoding, firsts: Sequence[int], device: str) -> None:
    with reporting(line):
        encoding.run(firsts, torch.device(device), lambda images: line.send(("codes", images)))
