"""Failures that a person can mend, in one sentence: what was expected, what was found, what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator

_DISK_FULL = (
    "no space left on device",
    "os error 28",  # safetensors
    "disk quota exceeded",
    "pytorchstreamwriter failed writing",  # torch.save, as the next
    "unexpected pos",
)


def sentence(error: BaseException) -> str | None:
    """The sentence for bad input, a refusing file system or a missing package; None for a fault of ours."""
    if any(mark in str(link).lower() for link in _chain(error) for mark in _DISK_FULL):
        return _full(_path(error))
    if isinstance(error, OSError):
        return _file_system(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("retinar"):
        return f"Expected the package {error.name}, found none: install it, and see `retinar doctor` for what needs it."
    if isinstance(error, ValueError):
        return " ".join(str(error).split()) or "Expected valid input, found a value that cannot be used."
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes. Writers of checkpoints wrap the file system's own error in theirs."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _path(error: BaseException) -> str | None:
    for link in _chain(error):
        if isinstance(link, OSError) and link.filename is not None:
            return str(link.filename)
    return None


def _full(path: str | None) -> str:
    where = f" at {path}" if path else ""
    return (
        f"Expected free space{where}, found the disk full: free some space or choose another --out, and run it again."
    )


def _file_system(error: OSError) -> str:
    path = str(error.filename) if error.filename is not None else "the path given"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(_path(error))
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Expected permission to use {path}, found none: change its permissions or choose another path."
    if error.errno == errno.EROFS:
        return f"Expected a writable folder at {path}, found a read-only file system: choose another --out."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"Expected a folder at {path}, found a file in its place: remove the file or choose another path."
    if error.errno == errno.EISDIR:
        return f"Expected a file at {path}, found a folder: give the path of a file."
    if error.errno == errno.ENOENT:
        return f"Expected a file or folder at {path}, found none: check the path."
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"Expected to read or write {path}, found that it fails ({reason}): check the path and the disk."
