"""PyTorch's first FSDP on a model with LlamaGen's parameters: ``python -m tests.train.fsdp1_run OUT``, by ranks.

Its modules are wrapped and its optimizer is made as LlamaGen's FSDP training does; what it computes is something
simple. For each dtype that computes, OUT/DTYPE gets the optimizer's files, and whole.pt: the same training in one
process. Then the files are read and written again by ours, for a fresh optimizer to load: its state and its next step
must be those of the one that went on. Widths are odd, so that alignment pads.
"""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from retinar.train.config import OptimConfig
from retinar.train.upstream.fsdp_files import ALIGNED, Shards, file_name, split

DIM, HIDDEN, VOCAB, LAYERS = 9, 21, 13, 3
OPTIM = OptimConfig(lr=1e-2)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.wo = nn.Linear(DIM, DIM, bias=False)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward, self.attention_norm, self.ffn_norm = (
            Attention(),
            FeedForward(),
            Norm(),
            Norm(),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.wqkv(x * self.attention_norm.weight).chunk(3, dim=-1)
        x = x + self.attention.wo(q * k.tanh() + v)
        ffn = self.feed_forward
        y = x * self.ffn_norm.weight
        return x + ffn.w2(ffn.w1(y).tanh() * ffn.w3(y))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(3, DIM)


class Model(nn.Module):
    """Its parameters have LlamaGen's names in LlamaGen's order, which test_upstream_files.py holds to golden files."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_embedding = Table()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = Norm()
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens) + self.cls_embedding.embedding_table(labels)[:, None]
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.output(x * self.norm.weight).float().flatten(0, 1), tokens.flatten())


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """In upstream's two groups, told apart by name."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if "norm" not in name], "weight_decay": OPTIM.weight_decay},
        {"params": [p for name, p in named.items() if "norm" in name], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, fused=True)


def wrapped(dtype: torch.dtype) -> FullyShardedDataParallel:
    torch.manual_seed(0)
    model = Model()
    blocks = list(model.layers)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in blocks),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        mixed_precision=MixedPrecision(param_dtype=dtype, reduce_dtype=dtype),
        use_orig_params=True,
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (4, 6), generator=generator)
        model(tokens, torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()


def check(out: Path, dtype: torch.dtype) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    plain = {name: tuple(p.shape) for name, p in Model().named_parameters()}
    model = wrapped(dtype)
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    out.mkdir(exist_ok=True)
    torch.save(state, out / file_name(rank, size))
    if rank == 0:
        torch.manual_seed(0)
        alone = Model()
        reference = adamw(alone)
        train(alone, reference, range(3))
        names = {p: name for name, p in alone.named_parameters()}
        torch.save({names[p]: values for p, values in reference.state.items()}, out / "whole.pt")
    dist.barrier()

    shards = Shards(out, plain)
    whole = {name: shards[name] for name in plain}
    again = dict(split(whole, OPTIM, plain, processes=size, shards=size, align=ALIGNED[dtype]))[file_name(rank, size)]
    assert again["state"].keys() == state["state"].keys()
    for number, values in state["state"].items():
        assert all(torch.equal(again["state"][number][key], value) for key, value in values.items()), number
    train(model, optimizer, range(3, 4))
    fresh = wrapped(dtype)
    loaded = adamw(fresh)
    train(fresh, loaded, range(3))
    loaded.load_state_dict(again)
    train(fresh, loaded, range(3, 4))
    ours: Any = zip(model.parameters(), fresh.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in ours)


def main(out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for dtype in ALIGNED:
        check(Path(out) / str(dtype), dtype)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
