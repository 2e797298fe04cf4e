"""AdamW's state in the numbering of LlamaGen's optimizers, and in its names for parameters.

Its optimizer has two groups, the tensors that decay (two or more dimensions) before the others (the norms), and numbers
parameters in this order. Ours names them, and packs ``w1`` and ``w3`` into ``w13``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.upstream import to_upstream_state_dict
from retinar.train.config import OptimConfig

Moments = dict[str, Tensor]
"""One parameter's "step" (a scalar), "exp_avg" and "exp_avg_sq"."""
Shapes = Mapping[str, Sequence[int]]
"""Parameters by upstream's names, in the order of its modules."""

MOMENTS = ("exp_avg", "exp_avg_sq")
_W13 = re.compile(r"^(?P<block>.*feed_forward)\.w13\.weight$")


def upstream_names(name: str) -> list[str]:
    """The parameters of upstream's that one of ours holds, by rows: two for ``w13``."""
    match = _W13.match(name)
    return [f"{match['block']}.w1.weight", f"{match['block']}.w3.weight"] if match else [name]


def upstream_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters, under upstream's names."""
    tensors = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in to_upstream_state_dict(tensors).items()}


def numbering(shapes: Shapes) -> list[str]:
    """The parameters in the order of their numbers."""
    return sorted(shapes, key=lambda name: len(shapes[name]) < 2)  # stable


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under upstream's names, none a view of another; ``tensors`` is emptied on the way."""
    result = {}
    for name in list(tensors):
        whole = tensors.pop(name)
        parts = to_upstream_state_dict({name: whole})
        result.update(parts if len(parts) == 1 else {key: part.clone() for key, part in parts.items()})
    return result


def unpacked_moments(optimizer: dict[str, Moments]) -> dict[str, Moments]:
    """As :func:`unpacked`, for what ``GPTTask.full_state`` has under "optimizer"."""
    result: dict[str, Moments] = {}
    for name in list(optimizer):
        state = optimizer.pop(name)
        halves = {key: unpacked({name: state[key]}) for key in MOMENTS}
        for own in upstream_names(name):
            step = state["step"].detach().to("cpu", torch.float32, copy=True)
            result[own] = {"step": step, **{key: halves[key][own] for key in MOMENTS}}
    return result


def packed(name: str, fetch: Callable[[str], Tensor]) -> Tensor:
    """Our tensor of that name, from those that ``fetch`` gives for upstream's names."""
    parts = [fetch(own) for own in upstream_names(name)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def param_groups(config: OptimConfig, shapes: Shapes) -> list[dict[str, Any]]:
    """The groups of an AdamW made as upstream makes its own, with parameters as numbers."""
    decaying = sum(len(shape) >= 2 for shape in shapes.values())
    optimizer = torch.optim.AdamW(
        [
            {"params": [torch.zeros(1)], "weight_decay": config.weight_decay},
            {"params": [torch.zeros(1)], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    first, second = optimizer.state_dict()["param_groups"]
    return [{**first, "params": list(range(decaying))}, {**second, "params": list(range(decaying, len(shapes)))}]


def state_dict(optimizer: Mapping[str, Moments], config: OptimConfig, shapes: Shapes) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` of upstream's data-parallel training gives: whole tensors by number."""
    state = {number: optimizer[name] for number, name in enumerate(numbering(shapes)) if name in optimizer}
    return {"state": state, "param_groups": param_groups(config, shapes)}


def by_name(stored: Any, shapes: Shapes, where: str) -> dict[str, Moments]:
    """The tensors of an AdamW's ``state_dict()`` by upstream's names; whoever numbered it, as upstream does.

    {} where there are none: a file whose optimizer was left out or had not begun. Parameters of which a shard has
    nothing are missing. InputError when it is the optimizer of another model, or none.
    """
    try:
        state, groups = stored["state"], stored["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        if not state:
            return {}
        names = numbering(shapes)
        if len(numbers) != len(names):
            raise InputError(
                f"Expected the optimizer of {len(names)} parameters in {where}, found {len(numbers)}: give the "
                "--gpt-model that it was trained with."
            )
        known = dict(zip(numbers, names, strict=True))
        return {
            known[number]: {key: torch.as_tensor(values[key]) for key in ("step", *MOMENTS)}
            for number, values in state.items()
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"Expected the state of AdamW in {where}, found something else ({error!r}): give another file."
        ) from None
