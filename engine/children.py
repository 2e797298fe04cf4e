"""Processes that share a piece of work on one machine, and the parent that watches them.

Nothing is shared between them but a line of messages from each to its parent, so that no death can block the others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from retinar.engine.errors import InputError
from retinar.engine.progress import Bar

GRACE = 10.0  # seconds for a process that was told to stop: it finishes the file that it is writing


class Child:
    """A process on ``device`` that runs ``work(line, *arguments)``, and the line to it."""

    def __init__(self, work: Callable[..., None], device: str, *arguments: object) -> None:
        context = get_context("spawn")  # a forked process cannot use CUDA
        self.device, self.done = device, False
        self.line, end = context.Pipe()
        self.process: BaseProcess = context.Process(target=work, args=(end, *arguments), daemon=True)
        self.process.start()
        end.close()  # so that the line ends with the process

    def send(self, job: object) -> None:
        with suppress(OSError):  # dead already: `watch` tells
            self.line.send(job)

    def heard(self) -> tuple[str, Any]:
        """The next message. InputError when the process has died instead."""
        try:
            return self.line.recv()
        except (EOFError, OSError):
            raise self.death() from None

    def death(self) -> InputError:
        self.process.join(GRACE)
        code = self.process.exitcode
        how = f"exit code {code}"
        with suppress(ValueError, TypeError):
            how += f", {signal.Signals(-code).name}"  # type: ignore[operator]
        return InputError(
            f"the process for {self.device} ended before its images were made ({how}); "
            "run the same command again to go on where it stopped"
        )


def watch(children: Sequence[Child], bar: Bar, total: int) -> None:
    """Pass on what the processes count until all are done. Raises what one of them raised, or its death."""
    running = {child.line: child for child in children}
    done = 0
    while running:
        heard = wait(list(running), timeout=1.0)
        for line in heard:
            child = running[line]  # type: ignore[index]
            kind, value = child.heard()
            if kind == "codes":
                bar.advance(value)
            elif kind == "image":
                done += 1
                bar.advance(0, f"{done} of {total} images")
            elif kind == "note":
                bar.advance(0, f"{value} on {child.device}")
            elif kind == "done":
                child.done = True
                del running[child.line]
            elif isinstance(value, BaseException):
                raise value
            else:
                raise RuntimeError(f"the process for {child.device} failed:\n{value}")
        for child in running.values():  # a process of its own may hold a dead child's line open
            if not heard and child.process.exitcode is not None and not child.line.poll():
                raise child.death()


def stop(children: Sequence[Child]) -> None:
    """End those that still work, at once, and see all of them out."""
    for child in children:
        child.line.close()
        if not child.done:
            child.process.terminate()
    deadline = time.monotonic() + GRACE
    for child in children:
        child.process.join(max(0.0, deadline - time.monotonic()))
        if child.process.exitcode is None:
            child.process.kill()
            child.process.join()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches the whole group of processes. Those started here ignore it from their first instruction: the
    parent stops them.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can signals be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- in the child


@contextmanager
def reporting(line: Connection) -> Iterator[None]:
    """Around all that a child does: its end, good or bad, is told on the line; it dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # closes files and threads on the way
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # the parent has loaded the same files and passed on what they gave cause for
    try:
        yield
        line.send(("done", None))
    except (InputError, OSError, ModuleNotFoundError) as error:
        tell(line, error)
    except Exception:
        tell(line, traceback.format_exc())


def tell(line: Connection, failure: object) -> None:
    with suppress(OSError):  # the parent is gone, which was the failure
        line.send(("failed", failure))


def _end_with_parent() -> None:
    """A parent that was killed stops nobody: its children do it themselves."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)
