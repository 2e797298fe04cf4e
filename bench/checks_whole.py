"""Checks that no case of a spec can make: the dropout mask itself, addresses past 2^31 elements, a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from retinar.bench.arguments import to_device
from retinar.bench.checks import Trial, first_line, runnable
from retinar.bench.ops import specs
from retinar.bench.variants import ATTENTION_DROPOUT, dropout_mask, op_of
from retinar.engine.config import gpt_config
from retinar.engine.model import GPT
from retinar.kernels import ops
from retinar.kernels.spec import OpSpec

FAR = 2**31
SEED = 11 - 2**63  # with its highest bit set: the key is 64 bits, whatever type carries it
ROWWISE = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed")
"""Ops whose results in a row depend on that row alone, so that a repeated tile of rows has a known answer."""


def dropout(backend: str, device: str, dtype: torch.dtype, *, positions: int = 150, dim: int = 64) -> str | None:
    """The mask of attention's dropout, weight by weight, is the reference's.

    Queries and keys are zero, so no weight is; v is the identity on ``dim`` keys at a time, so the output is weights.
    """
    batch, heads, dropout_p = 2, 2, 0.25
    seed = torch.tensor(SEED, dtype=torch.int64)
    expected = dropout_mask(batch, heads, positions, dropout_p, seed) != 0
    zeros = torch.zeros(batch, heads, positions, dim, dtype=dtype, device=device)
    rope = torch.zeros(positions, dim // 2, 2, device=device)
    kept = []
    for first in range(0, positions, dim):
        v = torch.eye(positions, dtype=dtype, device=device)[:, first : first + dim]
        v = torch.nn.functional.pad(v, (0, dim - v.shape[1])).expand(batch, heads, -1, -1)
        out = ops.rope_attention(zeros, zeros, v, rope, dropout_p=dropout_p, seed=seed.to(device), backend=backend)
        kept.append(out.cpu() != 0)
    wrong = int((torch.cat(kept, -1)[..., :positions] != expected).sum())
    where = f"{ATTENTION_DROPOUT.name} ({backend} on {device}, {dtype})"
    return (
        f"{where}: {wrong} of {expected.numel()} weights are dropped otherwise than by the reference" if wrong else None
    )


def far(spec: OpSpec, device: str, dtype: torch.dtype, *, elements: int = FAR, width: int = 1280) -> str | None:
    """Forward and backward on more than ``elements`` elements: every tile of rows gives what it gives alone.

    The gradients of weights, which sum over rows, are left out. Works on the preferred backend.
    """
    rows = 4096 if elements >= FAR else 3
    trial = Trial(spec, {"rows": rows, "width": width}, dtype, None, device)
    tile = to_device(trial.inputs, device)
    tiles = elements // (rows * max(each.shape[-1] for each in tile.values() if each.dim() == 2)) + 1

    def spread(x: Tensor) -> Tensor:
        return x.repeat(tiles, 1) if x.dim() == 2 else x

    def both(inputs: dict[str, Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        leaves = {key: each.requires_grad_() for key, each in inputs.items()}
        results = trial.run(leaves)
        grads = torch.autograd.grad(results, [each for each in leaves.values() if each.dim() == 2], cotangents)
        return [*(each.detach() for each in results), *grads]

    cotangents = [each.to(dtype).to(device) for each in trial.cotangents if each is not None]
    expected = both({key: each.clone() for key, each in tile.items()}, cotangents)
    found = both({key: spread(each) for key, each in tile.items()}, [spread(each) for each in cotangents])
    for index, (one, many) in enumerate(zip(expected, found, strict=True)):
        for number, part in enumerate(many.split(rows)):
            # A few ulp of the largest number: not bits, which plain torch does not promise. A wrong address is far off.
            if not torch.allclose(part, one, rtol=0.0, atol=4 * torch.finfo(dtype).eps * one.abs().max().item()):
                return (
                    f"{trial}: of {many.numel()} elements of result or gradient {index}, those from "
                    f"{number * one.numel()} on are wrong"
                )
    return None


def far_bytes(spec: OpSpec, dtype: torch.dtype) -> int:
    """Device memory that `far` needs, from the spec's own counts with room for the cotangents and copies."""
    rows = FAR // 1280 + 4096
    case = {"rows": rows, "width": 1280}
    backward = spec.backward_bytes(case, dtype.itemsize) if spec.backward_bytes is not None else 0
    return 2 * (spec.bytes(case, dtype.itemsize) + backward)


def training_step(device: str) -> str | None:
    """Loss and gradients of a small GPT in bf16 autocast, attention dropout on, against the same step in fp64.

    Held to the gradients' budget: at most 3 times the error of the same step in bf16 autocast on the CPU, where
    nothing is fused. The other dropouts draw from torch's generators, which differ between devices: they are off.
    """
    size = {"n_layer": 2, "n_head": 2, "dim": 64, "multiple_of": 32, "vocab_size": 101, "grid": 5, "num_classes": 2}
    off = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "class_dropout_prob": 0.0}
    config = gpt_config("GPT-tiny", **size, **off, attn_dropout_p=0.1)
    torch.manual_seed(3)
    model = GPT(config)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    weights = model.state_dict()
    codes, labels = torch.randint(101, (3, 25)), torch.tensor([0, 1, 1])

    def step(where: str, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        other = GPT(config).to(where, dtype)
        other.load_state_dict(weights)
        torch.manual_seed(4)  # the seeds of attention's dropout come from the CPU's generator
        with torch.autocast(where, torch.bfloat16, enabled=dtype == torch.float32):
            loss = other.train().loss(codes.to(where), labels.to(where), attention_backend=backend)
        loss.backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in other.parameters() if p.grad is not None])
        return [loss.detach().double().cpu(), gradient]

    truth = step("cpu", torch.float64, "reference")
    allowed = step("cpu", torch.float32, "reference")
    try:
        found = step(device, torch.float32, None)
    except Exception as error:
        return f"a training step of a small GPT in bf16 on {device}: {type(error).__name__}: {first_line(error)}"
    for name, one, plain, true in zip(("loss", "gradient"), found, allowed, truth, strict=True):
        off, bound = (one - true).norm(), 3 * (plain - true).norm() + 2**-8 * true.norm()
        if not off <= bound:
            return (
                f"a training step of a small GPT in bf16 on {device}: the {name} is off by {off:.3g} of "
                f"{true.norm():.3g}, allowed are {bound:.3g}"
            )
    return None


def jobs(device: str, dtype: torch.dtype, only: str | None = None) -> Iterator[Callable[[], str | None] | str]:
    """Every check of this file for a device, or a sentence on one that is left out. ``only`` as in `ops.specs`, the
    training step without it; on a CPU `far` is tried on a few elements."""
    chosen = specs(only)
    if ATTENTION_DROPOUT in chosen:
        for backend in runnable(ATTENTION_DROPOUT, device, dtype):
            if backend != "reference":
                yield partial(dropout, backend, device, dtype)
    for spec in chosen:
        if op_of(spec) not in ROWWISE:
            continue
        if device != "cuda":
            yield partial(far, spec, device, dtype, elements=4096, width=40)
        elif torch.cuda.mem_get_info()[0] < far_bytes(spec, dtype):
            yield f"{spec.name} past 2^31 elements: too little memory on the device"
        else:
            yield partial(far, spec, device, dtype)
    if only is None:
        yield partial(training_step, device)
