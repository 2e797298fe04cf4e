"""A model spread over the processes of a run: DDP, or FSDP2's ``fully_shard`` per block (Zhao et al., 2023).

The order is that of torchtitan: activation checkpointing, ``torch.compile``, then sharding, each per block, so that a
block is compiled once and gathered while the block before it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from retinar.engine.errors import InputError
from retinar.train.config import TrainConfig
from retinar.train.device import autocast
from retinar.train.world import World


class Parallel:
    """``model`` as the processes hold it (its names are those of one process), and ``forward`` to train with.

    ``sharded``: parameters are DTensors, each process has a piece of each.
    """

    def __init__(
        self, model: nn.Module, forward: nn.Module, config: TrainConfig, world: World, *, sharded: bool, cast: bool
    ) -> None:
        self.model, self.forward, self.world, self.sharded = model, forward, world, sharded
        self._precision, self._cast = config.precision, cast
        self._keeps = config.parallel == "sdp"  # weights stay gathered until the step's last part

    def autocast(self) -> Any:
        """The region for forward passes; nothing where weights are cast as they are gathered."""
        return nullcontext() if self._cast else autocast(self.world.device, self._precision)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a step: gradients are reduced with the last part alone."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(last)
            self.forward.set_is_last_backward(last)
            if self._keeps:
                self.forward.set_reshard_after_backward(last)
        yield

    def clear_gradients(self, optimizer: torch.optim.Optimizer, parts: int) -> None:
        """After a step of so many parts. Parts under DDP add to its buckets, where gradients must stay for that: made
        anew, they would exist twice."""
        kept = isinstance(self.forward, DistributedDataParallel) and parts > 1
        optimizer.zero_grad(set_to_none=not kept)

    def reshard(self) -> None:
        """After a forward pass without a backward one: weights that it has left gathered are pieces again."""
        if isinstance(self.forward, FSDPModule):
            for module in self.forward.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def wrap(
    model: nn.Module,
    parts: Sequence[nn.Module],
    config: TrainConfig,
    world: World,
    *,
    cast_weights: bool = True,
) -> Parallel:
    """Spread ``model`` over the world as ``config.parallel`` says; ``parts`` are the blocks to shard by themselves.

    In a world of one there is nothing to spread, whatever the mode. Weights must be the same in all processes.
    ``cast_weights`` False: under bf16, sharded weights are gathered in fp32, for autocast. InputError when hsdp's
    replicas do not divide the processes.
    """
    if world.size == 1:
        return Parallel(model, model, config, world, sharded=False, cast=False)
    if config.parallel == "ddp":
        forward = DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        forward.broadcast_buffers = False  # as an argument it is deprecated from torch 2.13 on
        return Parallel(model, forward, config, world, sharded=False, cast=False)
    mesh = _mesh(config, world)
    policy = MixedPrecisionPolicy()
    cast = cast_weights and config.precision == "bf16"
    if cast:
        reduce_dtype = torch.float32 if config.reduce_precision == "fp32" else torch.bfloat16
        # The rotary table among a block's inputs stays fp32.
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=config.parallel != "sdp")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return Parallel(model, model, config, world, sharded=True, cast=cast)


def _mesh(config: TrainConfig, world: World) -> DeviceMesh:
    kind = world.device.type
    if config.parallel != "hsdp":
        return init_device_mesh(kind, (world.size,))
    replicas = config.replicas if config.replicas is not None else max(1, world.size // world.local_size)
    if world.size % replicas:
        raise InputError(
            f"Expected replicas to divide the {world.size} processes, found {replicas}: set replicas to a divisor."
        )
    return init_device_mesh(kind, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard"))


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this process holds: itself, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole copies on the CPU in the main process, nothing elsewhere; one tensor at a time. All processes call it."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole


@torch.no_grad()
def spread(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, the same in every process, into those of the same name, sharded or not."""
    for name, tensor in tensors.items():
        own = into[name]
        if isinstance(own, DTensor):
            piece = distribute_tensor(tensor.to(own.device, own.dtype), own.device_mesh, own.placements)
            own.to_local().copy_(piece.to_local())
        else:
            own.copy_(tensor)


def norm_value(norm: Tensor) -> Tensor:
    """A gradient norm over all processes' pieces as a plain tensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
