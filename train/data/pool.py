"""Worker processes for independent pieces of work: safe to interrupt, safe to kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

from retinar.engine.errors import InputError

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 8  # pieces a message: small enough for a smooth progress bar and a quick stop
_WORTHWHILE = 32  # starting processes takes as long as about this many photographs


def default_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(
    function: Callable[[Item], Result], items: Mapping[Key, Item], workers: int
) -> Generator[tuple[Key, Result], None, None]:
    """Yield (key, function(item)) as they finish, in any order; ``function`` must be importable by name.

    Processes are spawned, because a fork of a process with threads (torch's, BLAS's) may deadlock. An exception in
    ``function`` is raised here and ends the rest; so does leaving the loop.
    """
    if workers == 1 or len(items) < _WORTHWHILE:
        for key, item in items.items():
            yield key, function(item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(items) // _CHUNK + 1), context, initializer=_prepare_worker)
    pending: dict[Future[list[Result]], list[Key]] = {}
    rest = iter(items.items())
    try:
        while True:
            while len(pending) < 3 * workers and (chunk := list(islice(rest, _CHUNK))):
                future = pool.submit(_run_chunk, function, [item for _, item in chunk])
                pending[future] = [key for key, _ in chunk]
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield from zip(pending.pop(future), future.result(), strict=True)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died (out of memory, a file that crashes its decoder, or a script without "
            "if __name__ == '__main__'): run again with --workers 1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_chunk(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]


def _prepare_worker() -> None:
    """Ctrl-C is the parent's business; and a killed parent must not leave workers behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
