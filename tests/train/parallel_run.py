"""What the processes of test_parallel.py do: ``python -m tests.train.parallel_run WHAT ...``.

``modes OUT CODES GOLDEN PICTURES MODE...``: short trainings of both models, and the golden optimizer trajectory, in
each mode one after another; the main process writes what came out to OUT/MODE.pt. ``train CODES RUN SETTINGS [POINT
N]``: train_gpt; with a point, process 1 dies by SIGKILL there (see killed_run.py; "write": while the Nth checkpoint's
tensors are written).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from retinar.engine.checkpoint import load_gpt
from retinar.engine.model import GPT
from retinar.engine.progress import silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import checkpoints, gpt
from retinar.train.code_files import CodeSet
from retinar.train.config import OptimConfig, TrainConfig
from retinar.train.data.images import ImageSet
from retinar.train.gpt import GPTTask, train_gpt
from retinar.train.optim import build_adamw, clip_gradients
from retinar.train.parallel import gathered, wrap
from retinar.train.rng import seed_everything
from retinar.train.tokenizer import TokenizerTask
from retinar.train.world import World, joined
from tests.train.killed_run import die_at_call
from tests.train.pictures import picture_config
from tests.train.tiny import quiet_config, tiny_config

STEPS = 20


def train(world: World, codes: CodeSet, **changes: Any) -> dict[str, Any]:
    """20 steps without dropout, with accumulation and the average: losses, norms, whole weights and averages."""
    seed_everything(4)
    config = quiet_config(batch_size=16, accumulation=2, steps=STEPS, ema_decay=0.9, **changes)
    task = GPTTask(GPT(config.model), config, codes, steps=STEPS, valid=codes, world=world)
    values = [task.step(step) for step in range(STEPS)]
    own = torch.tensor([[float(each["loss"]), float(each["grad_norm"])] for each in values], dtype=torch.float64)
    valid = task.evaluate(STEPS)["valid_loss"]
    assert all(parameter in task.optimizer.state for parameter in task.model.parameters()), "not those gathered"
    return {"values": world.mean(own), "valid": valid, **task.full_state()}


def golden(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    """Upstream's five AdamW steps; every process takes its share of the batch, doubled where it is too small."""
    expected = load_file(folder / "gpt_expected.safetensors")
    model = load_gpt(folder / "gpt_ddp.pt", folder / "gpt_config.json").train()
    config = TrainConfig(recipe="golden", precision="fp32", optim=OptimConfig(lr=1e-3), **changes)
    parallel = wrap(model, list(model.layers), config, world)
    optimizer = build_adamw(model, config.optim)
    tokens, labels = (expected[name].repeat_interleave(2, 0) for name in ("tokens", "labels"))
    own = slice(4 * world.rank // world.size, 4 * (world.rank + 1) // world.size)
    losses, norms = [], []
    for _ in range(5):
        loss = parallel.forward(tokens[own], labels[own], return_loss=True)
        loss.backward()
        norms.append(clip_gradients(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return {
        "loss": world.mean(torch.stack(losses)),
        "grad_norm": torch.stack(norms),
        "final": gathered(model.state_dict(), world),
    }


def tokenizer(world: World, pictures: str, **changes: Any) -> dict[str, Any]:
    """20 steps with crops, then whole images, parts and the average; without BatchNorm, which sees its process alone.

    At the paper's rate: biases before a norm have no gradient but rounding, and Adam makes whole steps of it.
    """
    settings: dict[str, Any] = {"optim": OptimConfig(lr=1e-4, weight_decay=0.0), "revive_after": None, **changes}
    config = picture_config(batch_size=16, disc_weight=0.0, steps=STEPS, **settings)
    seed_everything(5)
    images, valid = ImageSet(pictures), ImageSet(pictures, "valid")
    task = TokenizerTask(VQTokenizer(config.model), config, images, steps=STEPS, valid=valid, world=world)
    values = [task.step(step) for step in range(STEPS)]
    own = torch.tensor([[float(each[name]) for name in sorted(each)] for each in values], dtype=torch.float64)
    figures = task.evaluate(STEPS)
    model = task.averaged()
    weights = model.state_dict() if model is not None else {}
    return {"values": world.mean(own), "figures": figures, "weights": weights}


def adversaries(world: World, pictures: str) -> bool:
    """Whether replicas still agree to the bit after steps with the discriminator, codes revived."""
    config = picture_config(batch_size=16, disc_start=1)
    seed_everything(6)
    task = TokenizerTask(VQTokenizer(config.model), config, ImageSet(pictures), steps=8, world=world)
    for step in range(4):
        task.step(step)
    assert task.discriminator is not None
    trained = [*task.model.parameters(), *task.discriminator.parameters()]
    digests = world.gather(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained)).hexdigest())
    return len(set(digests)) == 1


def modes(out: str, codes: str, folder: str, pictures: str, *names: str) -> None:
    with joined("cpu") as world:
        data = CodeSet(codes)
        for name in names:
            changes = {"parallel": name, **({"replicas": 2} if name == "hsdp" else {})}
            found: dict[str, Any] = {
                "train": train(world, data, **changes),
                "golden": golden(world, Path(folder), **changes),
                "tokenizer": tokenizer(world, pictures, **changes),
            }
            if name == "ddp":
                found["revived"] = tokenizer(world, pictures, revive_after=2)
                found["agree"] = adversaries(world, pictures)
            if world.main:
                torch.save(found, Path(out) / f"{name}.pt")
            world.barrier()


def train_run(codes: str, run: str, settings: str, point: str = "none", number: str = "1") -> None:
    changes = json.loads(settings)
    make = quiet_config if changes.pop("quiet", False) else tiny_config
    config = make(**changes)
    if point != "none":
        with joined("cpu") as world:
            dies = world.rank == 1
            if dies and point == "step":
                die_at_call(gpt, "clip_gradients", int(number))
            elif dies and point == "write":
                die_at_call(checkpoints.dcp.FileSystemWriter, "write_data", int(number))
            train_gpt(config, codes, run, valid=codes, resume=True, progress=silent)
    else:
        train_gpt(config, codes, run, valid=codes, resume=True, progress=silent)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"modes": modes, "train": train_run}[sys.argv[1]](*sys.argv[2:])
