"""LlamaGen's own classes on our files, from a user's clone: ``python clone_process.py CLONE JOB.json OUT.pt``.

It imports nothing of ours: ours and theirs never share a process, whose folders have the same names. The job is
{"model": arguments of its ModelArgs, "dropout": its value for all, "checkpoint": a .pt or an FSDP folder to resume, or
null, "tokens": a .pt with "tokens" [steps, batch, T] and "labels" [steps, batch], "save": where to write its own
checkpoint, or null}. Model and optimizer are made and loaded as its training scripts do, then trained on the batches;
the result holds the logits before, losses, and the weights after. With torchrun's variables: its FSDP training.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

LR, DECAY, BETAS = 1e-3, 0.05, (0.9, 0.95)


def main(clone: str, job_file: str, out: str) -> int:
    sys.path.insert(0, clone)
    # Its data sets and W&B want packages that the optimizer does not need.
    for name, what in (("dataset", None), ("dataset.build", "build_dataset"), ("wandb", None)):
        sys.modules[name] = types.ModuleType(name)
        if what is not None:
            setattr(sys.modules[name], what, None)
    torch.set_num_threads(1)
    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    gpt = importlib.import_module("autoregressive.models.gpt")
    p = job["dropout"]
    dropouts = {"token_dropout_p": p, "resid_dropout_p": p, "ffn_dropout_p": p, "class_dropout_prob": 0.1}
    torch.manual_seed(0)
    model = gpt.Transformer(gpt.ModelArgs(**job["model"], **dropouts))
    torch.nn.init.normal_(model.output.weight, std=0.02)
    model.cls_embedding.dropout_prob = p
    data = torch.load(job["tokens"])
    run = sharded if "RANK" in os.environ else whole
    found = run(model, job, data["tokens"], data["labels"])
    if found:
        torch.save(found, out)
    return 0


def whole(model: Any, job: dict[str, Any], tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """As train_c2i.py."""
    script = importlib.import_module("autoregressive.train.train_c2i")
    optimizer = script.creat_optimizer(model, DECAY, LR, BETAS, logging.getLogger("clone"))
    steps = 0
    if job["checkpoint"]:
        import argparse

        # Its own call predates torch.load's default of weights alone, which refuses the flags in its own files, too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(job["checkpoint"], map_location="cpu")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        steps = checkpoint["steps"]
    before = logits(model, tokens[0], labels[0])
    model.train()
    losses = []
    for codes, classes in zip(tokens, labels, strict=True):
        _, loss = model(cond_idx=classes, idx=codes[:, :-1], targets=codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        steps += 1
    if job["save"]:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": steps}
        torch.save(state, job["save"])
    return {"logits": before, "losses": losses, "weights": model.state_dict(), "steps": steps}


def sharded(model: Any, job: dict[str, Any], tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, Any] | None:
    """As train_c2i_fsdp.py, on CPUs."""
    script = importlib.import_module("autoregressive.train.train_c2i_fsdp")
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    folder = Path(job["checkpoint"]) if job["checkpoint"] else None
    if folder is not None:
        model.load_state_dict(torch.load(folder / "consolidated.pth", map_location="cpu"), strict=True)
    before = logits(model, tokens[0], labels[0])
    blocks = model.get_fsdp_wrap_module_list()
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in blocks),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        mixed_precision=MixedPrecision(param_dtype=torch.float, reduce_dtype=torch.float),
        use_orig_params=True,
    )
    optimizer = script.creat_optimizer_by_name(wrapped, DECAY, LR, BETAS, rank, logging.getLogger("clone"))
    steps = 0
    if folder is not None:
        files = [name for name in os.listdir(folder) if name.startswith("optimizer.") and name.endswith(".pth")]
        assert len(files) == size, "upstream resumes at the same number of processes alone"
        optimizer.load_state_dict(torch.load(folder / f"optimizer.{rank:05d}-of-{size:05d}.pth", map_location="cpu"))
        steps = int((folder / "resume_step.txt").read_text().strip())
    wrapped.train()
    losses = []
    for codes, classes in zip(tokens, labels, strict=True):
        own = slice(rank * len(codes) // size, (rank + 1) * len(codes) // size)
        optimizer.zero_grad()
        _, loss = wrapped(cond_idx=classes[own], idx=codes[own, :-1], targets=codes[own])
        loss.backward()
        wrapped.clip_grad_norm_(1.0)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / size)
        steps += 1
    # Not offloaded: on a CPU that leaves views of memory that is freed.
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        weights = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    if job["save"]:
        target = Path(job["save"])
        target.mkdir(exist_ok=True)
        torch.save(optimizer.state_dict(), target / f"optimizer.{rank:05d}-of-{size:05d}.pth")
        if rank == 0:
            torch.save(weights, target / "consolidated.pth")
            (target / "resume_step.txt").write_text(f"{steps}\n")
    dist.barrier()
    dist.destroy_process_group()
    return {"logits": before, "losses": losses, "weights": weights, "steps": steps} if rank == 0 else None


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """In evaluation, but with training's rotary table: the position argument is for its cache."""
    model.eval()
    positions = torch.arange(tokens.shape[1])
    found, _ = model(cond_idx=labels, idx=tokens[:, :-1], input_pos=positions)
    return found


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
