"""A classifier of photographs, trained on class-balanced batches of varied views. It is no diagnostic tool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retinar.engine.errors import InputError
from retinar.engine.metrics.networks import Recipe, build_network
from retinar.engine.metrics.pictures import Pictures
from retinar.engine.progress import Bar

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which torchvision's weights were trained with (RGB, of values in [0, 1])."""
INFER_BATCH = 64
STEPS_BETWEEN_CHECKS = 20
SETTLING = 10
"""Training batches that a state's batch norms take their statistics from before it is asked anything."""


@dataclass
class Classifier:
    """A trained network; ``step`` is the one whose state was kept."""

    network: nn.Module
    recipe: Recipe
    device: torch.device
    step: int

    def logits(self, pictures: Pictures) -> np.ndarray:
        """fp32 [n, classes], the mean over a photograph and its mirror image."""
        return _logits(self.network, pictures.images_NCHW, self.recipe, self.device)


def _autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16)


def _logits(network: nn.Module, images_NCHW: Tensor, recipe: Recipe, device: torch.device) -> np.ndarray:
    rows = []
    network.eval()
    with torch.inference_mode(), _autocast(recipe, device):
        for batch_BCHW in images_NCHW.split(INFER_BATCH):
            images = normalised(batch_BCHW.to(device).float() / 255)
            rows.append(((network(images).float() + network(images.flip(-1)).float()) / 2).cpu())
    logits_NK = torch.cat(rows)
    if not logits_NK.isfinite().all():
        raise InputError(
            f"Expected finite scores of {recipe.network}, found that its training diverged: choose another network, "
            "or a lower learning rate."
        )
    return logits_NK.numpy()


def normalised(images_BCHW: Tensor) -> Tensor:
    """Values in [0, 1] -> by ImageNet's mean and deviation, channels last."""
    mean, std = (torch.tensor(each, device=images_BCHW.device).view(1, 3, 1, 1) for each in (MEAN, STD))
    return ((images_BCHW - mean) / std).contiguous(memory_format=torch.channels_last)


def train_classifier(
    pictures: Pictures,
    classes: int,
    recipe: Recipe,
    *,
    seed: int = 0,
    choose: tuple[Pictures, Callable[[np.ndarray], float]] | None = None,
    device: torch.device | str = "cpu",
    bar: Bar | None = None,
) -> Classifier:
    """Train ``recipe.steps`` steps on batches that hold every class equally often.

    ``choose`` gives photographs and a figure of their logits, larger is better: the best of up to ``recipe.checks``
    states in the second half is kept, the later one of equals; without it, the last. The same seed gives the same
    classifier on one CPU with one number of threads; on a GPU it does up to rounding. ``bar`` advances by one a step.
    """
    device = torch.device(device)
    members = [np.flatnonzero(pictures.classes_N == number) for number in range(classes)]
    if min(len(index) for index in members) == 0:
        raise InputError(f"Expected training images of {classes} classes, found {[len(index) for index in members]}.")
    network = build_network(recipe, classes, seed).to(device)
    count = min(recipe.checks, 1 + recipe.steps // 2 // STEPS_BETWEEN_CHECKS)
    checks = {recipe.steps - recipe.steps // 2 * number // count for number in range(count)}
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=max(2, recipe.steps))
    best: tuple[float, int, dict[str, Tensor]] | None = None
    own = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=own), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        torch.manual_seed(seed)  # dropout draws from the global generator
        for step in range(1, recipe.steps + 1):
            network.train()
            index, target_B = _balanced(members, recipe.batch_size, draw)
            images_BCHW = augment(pictures.images_NCHW[index].to(device), draw)
            with _autocast(recipe, device):
                logits_BK = network(images_BCHW)
            loss = F.cross_entropy(logits_BK.float(), target_B.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step == recipe.steps or (choose is not None and step in checks):
                _settle(network, pictures, members, recipe, device)
            if choose is not None and step in checks:
                value = choose[1](_logits(network, choose[0].images_NCHW, recipe, device))
                if best is None or not value < best[0]:
                    best = value, step, {name: tensor.clone() for name, tensor in network.state_dict().items()}
            if bar is not None:
                bar.advance(1, f"loss {loss.item():.3f}" if step % 10 == 0 else None)
    if best is not None:
        network.load_state_dict(best[2])
    return Classifier(network.eval(), recipe, device, best[1] if best else recipe.steps)


def _settle(
    network: nn.Module, pictures: Pictures, members: list[np.ndarray], recipe: Recipe, device: torch.device
) -> None:
    """Batch norms' statistics anew, the plain mean over the same batches each time.

    The running ones lag behind weights that have moved for a few hundred steps only, and hold what they began with.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    draw = torch.Generator().manual_seed(0)
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # every batch counts alike
    network.train()
    with torch.inference_mode(), _autocast(recipe, device):
        for _ in range(SETTLING):
            index, _ = _balanced(members, recipe.batch_size, draw)
            network(augment(pictures.images_NCHW[index].to(device), draw))


def _balanced(members: list[np.ndarray], batch_size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    target = (torch.arange(batch_size) + torch.randint(len(members), (), generator=draw)) % len(members)
    where = torch.rand(batch_size, generator=draw, dtype=torch.float64).numpy()
    index = [members[label][int(at * len(members[label]))] for label, at in zip(target, where, strict=True)]
    return torch.from_numpy(np.array(index)), target


def augment(images_BCHW: Tensor, draw: torch.Generator) -> Tensor:
    """uint8 [B, 3, H, W] -> normalised views, each drawn for itself.

    Mirrored left to right and top to bottom, turned by up to 30 degrees, scaled by 0.85 to 1.1, shifted by up to 2.5 %,
    and with other contrast, brightness and white balance: what differs between cameras should not decide.
    """
    count, device = len(images_BCHW), images_BCHW.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=draw)).to(device)

    angle, zoom = uniform(-0.52, 0.52, count), 1 / uniform(0.85, 1.1, count)
    flip = (torch.randint(0, 2, (2, count), generator=draw) * 2 - 1).to(device)
    rows = (
        torch.stack([angle.cos() * flip[0] * zoom, -angle.sin() * flip[1] * zoom, uniform(-0.05, 0.05, count)], 1),
        torch.stack([angle.sin() * flip[0] * zoom, angle.cos() * flip[1] * zoom, uniform(-0.05, 0.05, count)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images_BCHW.shape), align_corners=False)
    images = F.grid_sample(images_BCHW.float() / 255, grid, align_corners=False)
    level = images.mean((2, 3), keepdim=True)
    images = (images - level) * uniform(0.7, 1.4, count, 1, 1, 1) + level * uniform(0.8, 1.2, count, 1, 1, 1)
    return normalised((images * uniform(0.9, 1.1, count, 3, 1, 1)).clamp(0, 1))
