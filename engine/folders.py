"""Folders that are either whole or absent: written beside their place, flushed, and swapped in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retinar.engine.errors import InputError


@contextmanager
def atomic_folder(folder: Path | str, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a new folder beside ``folder``; put it in place when the block ends well, remove it otherwise.

    An existing folder is replaced as a whole when ``ours(folder)`` says it may be, and kept, with an InputError, when
    not; an empty one always may. Whoever looks finds the old folder or the new one; a power cut between the two renames
    of a replacement leaves the old one beside its place as ``.NAME.old``. Raises OSError as the file system does.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, and what it points to is replaced
    if os.path.lexists(folder) and not (folder.is_dir() and (not any(folder.iterdir()) or ours(folder))):
        raise InputError(
            f"Expected {folder} to be free or to hold a checkpoint to replace, found other files: choose another name."
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
