"""The global random generators: seeding, saving as JSON values, restoring."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's (CPU and this process's GPU) global generators as JSON values."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set all generators back; a GPU's state is dropped where there is none."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    legacy = state["numpy"]
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": np.array(legacy["state"]["key"], np.uint32)}})
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever the block draws, the global generators go on afterwards as if it had not run."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng(state)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_process(seed: int, rank: int) -> None:
    """Random numbers of its own for a process of a parallel run, after weights that all have in common were drawn.

    Process 0 goes on with what it has, as a run of one process does.
    """
    if rank:
        seed_everything(int(np.random.default_rng([seed, rank]).integers(2**63 - 1)))


def seed_new_process(rank: int, step: int) -> None:
    """As :func:`seed_process`, for one that joins a run at ``step``; the seed is drawn from the present states."""
    seed_process(torch.initial_seed() % 2**63 + step, rank)


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
