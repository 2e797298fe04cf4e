"""Files that are either whole or absent, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block ends well, remove it otherwise.

    The data is flushed to the disk before the rename, so a power cut leaves the old file or the new one, never a part.
    Raises OSError as the file system does (disk full, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write JSON atomically, two spaces a level, keys in the given order."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Names of files need not be UTF-8; what stands for such a byte then is an escape of JSON too.
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, lower-case hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
