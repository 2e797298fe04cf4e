"""The device that a person asks for."""

from __future__ import annotations

import torch

from retinar.engine.errors import InputError


def find_device(name: torch.device | str | None = None) -> torch.device:
    """``name`` (cpu, cuda, cuda:N), or the GPU where there is one. Raises InputError for what is not there."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"Expected a device among cpu, cuda and cuda:N, found {name!r}: choose one.") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"Expected a device among cpu, cuda and cuda:N, found {name!r}: choose one.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"Expected the device {found}, found {torch.cuda.device_count()} GPUs: use --device cpu.")
    return found
