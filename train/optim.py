"""AdamW with decay on matrices only, learning-rate schedules, clipping, and the exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from retinar.train.config import OptimConfig
from retinar.train.parallel import gathered, local, norm_value, spread
from retinar.train.world import World

_FUSED_DEVICES = ("cpu", "cuda")


def build_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over ``model``'s trainable parameters, its state allocated at once (zeros).

    Weight decay acts on tensors of two or more dimensions (matrices, embeddings, convolutions), not on norms and
    biases. The fused implementation is used where the device has one: it needs no temporary copies of the weights.
    Allocating the state here, not at the first step, gives checkpoints something to load into.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in _FUSED_DEVICES for p in parameters)
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
        foreach=None if fused else False,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            # The fused kernels read the count on the parameter's device.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else None),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter name: {"layers.0...weight": {"step", "exp_avg", "exp_avg_sq"}}.

    The tensors themselves, not copies: loading a checkpoint into them in place restores the optimizer. Names instead of
    numbers make it independent of the order of parameters, so another sharding can load it. Hyper-parameters are
    not state: they come from the run's config.
    """
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
) -> None:
    """Copy tensors as given by :func:`optimizer_state` back in; those that already are the optimizer's stay."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensors in state.items():
            for key, tensor in tensors.items():
                own = optimizer.state[parameters[name]][key]
                if own is not tensor:
                    own.copy_(tensor)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of step ``step`` (counted from 0) of ``total_steps``: warm-up, then constant or half a cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    # The last step (total - 1) has the final rate exactly.
    length = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1.0 - config.final_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameter groups the rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients to a global L2 norm of at most ``max_norm`` (None: leave them); returns the norm before, over
    all processes where gradients are sharded."""
    return norm_value(nn.utils.clip_grad_norm_(list(parameters), math.inf if max_norm is None else max_norm))


class EMA:
    """Exponential moving average of a module's parameters, in fp32: ``average += (1 - decay) * (weight - average)``.

    ``averages`` holds tensors by parameter name; they live on the parameters' device, sharded as they are, and are what
    a checkpoint saves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {
            name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights after an optimizer step."""
        parameters = dict(model.named_parameters())
        weights = [local(parameters[name].detach()).float() for name in self.averages]
        torch._foreach_lerp_([local(average) for average in self.averages.values()], weights, 1.0 - self.decay)

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor]) -> None:
        """Copy saved averages in (a no-op for tensors that already are ours)."""
        for name, tensor in averages.items():
            if self.averages[name] is not tensor:
                self.averages[name].copy_(tensor)


def full_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, dict[str, Tensor]]:
    """As :func:`optimizer_state`, whole and on the CPU in the main process ({} elsewhere). All processes call it."""
    state = optimizer_state(model, optimizer)
    whole = {name: gathered(tensors, world) for name, tensors in state.items()}
    return whole if world.main else {}


def load_full_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]
) -> None:
    """Spread what :func:`full_optimizer_state` gave, the same in every process, over the processes."""
    own = optimizer_state(model, optimizer)
    for name, tensors in state.items():
        spread(tensors, own[name])
