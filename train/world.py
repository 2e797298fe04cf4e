"""The processes of a run: one, or those that ``torchrun`` started. What they do together on the host is here.

Tensors of training travel by NCCL (gloo on CPUs); plain values by gloo, from host to host, without waiting for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.train.device import pick_device

T = TypeVar("T")

#: A collective that waits longer means that a process is gone or hangs. Checkpoints of 3B on slow disks take minutes.
TIMEOUT = timedelta(minutes=30)


class World:
    """``rank`` of ``size`` processes, ``local_rank`` of ``local_size`` on this machine, at work on ``device``.

    ``control`` is a gloo group for plain values, ``writing`` one more for checkpoints that are written beside the
    training; both None in a world of one process, whose methods return at once.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        control: dist.ProcessGroup | None = None,
        writing: dist.ProcessGroup | None = None,
    ) -> None:
        self.device, self.rank, self.size = device, rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.control, self.writing = control, writing

    @property
    def main(self) -> bool:
        """Whether this is the process that reports and writes what all have in common."""
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """What ``work()`` gives in the main process, in all of them; it must pickle.

        An InputError or OSError there is an InputError here (``elsewhere`` is set on all copies but the main process's,
        which is the one to be printed); any other error ends the others with a RuntimeError.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        error: BaseException | None = None
        if self.main:
            try:
                outcome = ["done", work()]
            except (InputError, OSError) as raised:
                error, outcome = raised, ["refused", str(raised)]
            except BaseException as raised:
                error, outcome = raised, ["failed", repr(raised)]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if error is not None:
            raise error
        if outcome[0] == "refused":
            raise elsewhere(outcome[1])
        if outcome[0] == "failed":
            raise RuntimeError(f"the main process failed: {outcome[1]}")
        return outcome[1]

    def together(self, work: Callable[[], T]) -> T:
        """``work()`` in every process; an InputError or OSError of any of them is raised in all."""
        if self.size == 1:
            return work()
        found: T | None = None
        error: InputError | OSError | None = None
        try:
            found = work()
        except (InputError, OSError) as raised:
            error = raised
        sentences = self.gather(None if error is None else str(error))
        first = next((rank for rank, sentence in enumerate(sentences) if sentence is not None), None)
        if first is not None:
            raise error if error is not None and first == self.rank else elsewhere(str(sentences[first]))
        return found  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank, in all of them; it must pickle."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of a tensor on the host."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.control)
            values /= self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the host."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.control)
        return values

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        value_1 = torch.tensor([value])
        dist.all_reduce(value_1, dist.ReduceOp.MAX, group=self.control)
        return int(value_1)

    def joined_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; of equal shape, on the device of training."""
        if self.size == 1:
            return rows
        every = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather(list(every.chunk(self.size)), rows.contiguous())
        return every

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier(group=self.control)


def elsewhere(sentence: str) -> InputError:
    """An InputError that another process has raised, and prints."""
    error = InputError(sentence)
    error.elsewhere = True  # type: ignore[attr-defined]
    return error


def launched() -> bool:
    """Whether ``torchrun`` (or what sets the same variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of this process while the block runs. ``device``: as a config names it; of several GPUs each process
    takes the one of its local rank. InputError when there are fewer GPUs than processes on this machine."""
    where = pick_device(device)
    if not launched():
        yield World(where)
        return
    if "RANK" not in os.environ:
        raise InputError("Expected RANK beside WORLD_SIZE in the environment, found none: start with torchrun.")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if where.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"Expected a GPU for each of {local_size} processes, found {torch.cuda.device_count()}: "
                "lower torchrun's --nproc-per-node, or set device=cpu."
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    begun = not dist.is_initialized()
    if begun:
        backend = "cuda:nccl,cpu:gloo" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=where if where.type == "cuda" else None)
    control, writing = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
    world = World(
        where,
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        control=control,
        writing=writing,
    )
    yield world
    # Not after an error: NCCL's end is a collective, and the others may be in another one. torchrun ends them.
    if begun:
        dist.destroy_process_group()
