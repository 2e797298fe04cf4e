"""The memory of a training step, counted op by op: which storages are alive, what they are for, and their highest sum.

The step may run on fake tensors, which have shapes and storages but no memory (then nothing is computed, either), or on
real ones. torch's own trackers (``torch.distributed._tools``) do the same; this one also takes steps of several parts,
knows what our ops allocate beside their results, and needs nothing of FSDP2's inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retinar.train.parallel import local

Category = Literal["parameters", "gradients", "optimizer", "ema", "gathered", "activations"]
CATEGORIES: tuple[Category, ...] = ("parameters", "gradients", "optimizer", "ema", "gathered", "activations")
"""gathered: what FSDP2 has put together, weights before they are dropped again and gradients before they are reduced.
activations: all else, what the backward pass needs and what is passing through."""

CUDA_BLOCK = 512
"""Bytes that torch's allocator for CUDA rounds up to."""

# What FSDP2 names its copies in and out of the buffers of its collectives.
_GATHERING = {"all_gather_copy_in", "split_with_sizes_copy", "chunk_cat"}

Scratch = Callable[..., int]
"""Bytes that an op allocates beside its results while it runs, from its arguments."""


@dataclass
class _Block:
    """One storage."""

    storage: weakref.ref[torch.UntypedStorage]
    category: Category
    size: int


class MemoryTrace(TorchDispatchMode):
    """Counts while it is entered. ``peak``: the most bytes alive at once; ``at_peak``: by category, then.

    Args:
        fake: the mode whose tensors to count; None counts real ones.
        block: what sizes are rounded up to.
        scratch: op name with its namespace -> what it needs beside its results.

    Ops that are made of others (a fused optimizer, a reference in plain torch) count with their results alone, unless
    ``scratch`` knows more.
    """

    def __init__(
        self, *, fake: FakeTensorMode | None = None, block: int = 1, scratch: Mapping[str, Scratch] | None = None
    ) -> None:
        super().__init__()
        self.fake, self.block, self.scratch = fake, block, scratch or {}
        self.alive = dict.fromkeys(CATEGORIES, 0)
        self.at_peak = dict(self.alive)
        self._blocks: dict[int, _Block] = {}
        self._resized: list[int] = []  # blocks that FSDP2 empties and fills again instead of dropping them

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def add(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Count tensors that exist already, or say what those that are counted are for."""
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            known = self._blocks.get(storage._cdata)
            if known is None:
                self._enter(storage, category)
            elif known.category != category:
                self.alive[known.category] -= known.size
                self.alive[category] += known.size
                known.category = category
        self._settle(0)

    def rename(self, before: Category, after: Category) -> None:
        """Everything alive of one category is of another from here on."""
        for known in self._blocks.values():
            if known.category == before:
                known.category = after
        self.alive[after] += self.alive[before]
        self.alive[before] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor asks again, with the tensors of this process
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [each for each in _leaves(result) if self._counts(each)]
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._blocks:
                self._enter(storage, "activations")
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fsdp" and name in _GATHERING:
            self._gathering(name, args, kwargs)
        needs = self.scratch.get(func._schema.name)
        self._settle(needs(*args) if needs is not None else 0)
        return result

    def _counts(self, tensor: Any) -> bool:
        if isinstance(tensor, FakeTensor):  # DTensor works out shapes in a mode of its own
            return tensor.fake_mode is self.fake
        return self.fake is None and isinstance(tensor, Tensor) and not isinstance(tensor, DTensor)

    def _rounded(self, size: int) -> int:
        return -(-size // self.block) * self.block

    def _enter(self, storage: torch.UntypedStorage, category: Category) -> None:
        key, size = storage._cdata, self._rounded(storage.nbytes())
        self._blocks[key] = _Block(weakref.ref(storage, lambda _: self._leave(key)), category, size)
        self.alive[category] += size

    def _leave(self, key: int) -> None:
        gone = self._blocks.pop(key)
        self.alive[gone.category] -= gone.size

    def _gathering(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # chunk_cat reads unsharded gradients, which are dropped next, and writes the buffer of their reduction.
        for tensor in filter(self._counts, tree_leaves((args, kwargs))):
            known = self._blocks.get(tensor.untyped_storage()._cdata)
            if known is None or known.category == "activations":  # not a weight that is sent as it is
                self.add([tensor], "gathered")
        if name == "split_with_sizes_copy":
            filled = [tensor.untyped_storage()._cdata for tensor in kwargs["out"]]
            for key in filled:
                self._resize(key)
            self._resized += [key for key in filled if key not in self._resized]

    def _resize(self, key: int) -> None:
        known = self._blocks[key]
        storage = known.storage()
        size = self._rounded(storage.nbytes()) if storage is not None else 0
        self.alive[known.category] += size - known.size
        known.size = size

    def _settle(self, scratch: int) -> None:
        """Compare what is alive with the most so far. Emptied blocks are looked at only when they could matter."""
        if sum(self.alive.values()) + scratch <= self.peak:
            return
        self._resized = [key for key in self._resized if key in self._blocks]
        for key in self._resized:
            self._resize(key)
        if sum(self.alive.values()) + scratch > self.peak:
            self.at_peak = {**self.alive, "activations": self.alive["activations"] + scratch}


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once; of sharded ones, this process's."""
    storages = (local(tensor).untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _leaves(result: Any) -> Iterable[Any]:
    return (result,) if isinstance(result, Tensor) else tree_leaves(result)


class CudaDropout(nn.Module):
    """Dropout by the kernel that a GPU uses, wherever the tensors are: it keeps a mask of a byte an element, where the
    CPU's keeps factors in the tensor's dtype."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p > 0 else x


def with_cuda_dropout(model: nn.Module) -> None:
    """Put :class:`CudaDropout` in the place of every dropout of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, CudaDropout(child.p))
