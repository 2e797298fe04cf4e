"""Ctrl-C and SIGTERM as wishes to stop, to be met after the step in progress."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Literal


class StopSignals:
    """While active, the first SIGINT or SIGTERM sets ``reason``; another SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.reason: Literal["interrupted", "terminated"] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"
        # os.write: print is not safe inside a signal handler.
        os.write(2, b"\nstopping: the step in progress is finished and saved; Ctrl-C again stops at once.\n")
