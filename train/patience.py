"""Processes whose shares end far apart wait for each other as long as it takes.

In training a collective that waits for half an hour means that something hangs. Where each process has hours of work of
its own, it means that their machines differ; one that died ends the others without any time-out.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from retinar.train.world import World, elsewhere

T = TypeVar("T")
PATIENCE = timedelta(days=365)


def patient(world: World) -> World:
    """The same processes with such patience. All of them call it."""
    if world.size == 1:
        return world
    return World(
        world.device,
        rank=world.rank,
        size=world.size,
        local_rank=world.local_rank,
        local_size=world.local_size,
        control=dist.new_group(backend="gloo", timeout=PATIENCE),
        writing=world.writing,
    )


def apart(world: World, work: Callable[[], T]) -> T:
    """``work()`` in every process of a patient world, which all wait for the last one.

    What one of them raises is raised there at once, and ends the others: torchrun sees to those that still work, and
    those that wait raise an InputError ``elsewhere``.
    """
    found = work()
    try:
        world.barrier()
    except RuntimeError as error:
        raise elsewhere("another process failed") from error
    return found
