"""The lines that LlamaGen's scripts write to log.txt and to the screen, in its format: other programs read them."""

from __future__ import annotations

import sys
import time
from pathlib import Path


class Log:
    """``[2024-06-15 12:00:00] text`` (the time in blue, in the file too) to stderr and to ``folder``/log.txt.

    None: no lines at all, for the processes that do not report.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "log.txt"

    def info(self, text: str) -> None:
        """One line. The file is opened for each, so that a full disk or a removed folder is told where it happens."""
        if self.path is None:
            return
        line = f"[\033[34m{time.strftime('%Y-%m-%d %H:%M:%S')}\033[0m] {text}"
        print(line, file=sys.stderr, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
