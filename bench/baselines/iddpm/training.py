"""Training iDDPM on prepared photographs: what a step does, and a whole run. The loop, the folder and the resume are
those of our own methods (``train.loop``).

What a step draws (photographs, mirrors, diffusion steps, noise, labels left out) is a pure function of (seed, step,
place in the batch), so that a resumed run, and one of more processes, draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from retinar.bench.baselines.iddpm.checkpoint import load_iddpm, save_iddpm
from retinar.bench.baselines.iddpm.diffusion import Diffusion, Losses
from retinar.bench.baselines.iddpm.guidance import drop_labels
from retinar.bench.baselines.iddpm.noise import normal, seeded
from retinar.bench.baselines.iddpm.timesteps import Timesteps
from retinar.bench.baselines.iddpm.train_config import IDDPMTrainConfig
from retinar.bench.baselines.iddpm.unet import UNet, start_from
from retinar.engine.checkpoint import digest
from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, plain
from retinar.train import loop
from retinar.train.config import defaults, to_dict
from retinar.train.crops import Crops, fingerprint
from retinar.train.data.images import ImageSet
from retinar.train.device import compile_parts, memory_advice
from retinar.train.guard import Guard, batch_names
from retinar.train.meters import Meters, matmul_flops_per_s
from retinar.train.metrics_log import check_wandb
from retinar.train.optim import (
    EMA,
    build_adamw,
    clip_gradients,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from retinar.train.order import Order, own_rows
from retinar.train.parallel import gathered, local, wrap
from retinar.train.rng import seed_everything, seed_process
from retinar.train.state import RunFolder
from retinar.train.world import World, joined


class IDDPMTask:
    """The U-Net, its optimizer and the photographs: what :func:`retinar.train.loop.run` drives.

    ``model`` is trained in place where it lies; ``steps`` is the length that a cosine schedule spans.
    """

    name = "iddpm"
    criterion = "valid_loss"

    def __init__(
        self,
        model: UNet,
        config: IDDPMTrainConfig,
        images: ImageSet,
        *,
        steps: int,
        valid: ImageSet | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.config, self.images, self.valid = model, config, images, valid
        self.steps, self.done = steps, 0
        self.device = next(model.parameters()).device
        self.world = world or World(self.device)
        self.rows = own_rows(config, self.world)
        if self.world.size == 1 or config.parallel == "ddp":  # sharding wants weights in torch's own order
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # In this order: activation checkpointing, compile, sharding.
        model.activation_checkpointing = config.activation_checkpointing == "full"
        if config.compile:
            compile_parts(model.stages, self.device)
        self.parallel = wrap(model, model.stages, config, self.world)
        self.diffusion = Diffusion(config.model, device=self.device)
        self.guard = Guard(config.guard, config.spike, tells=self.world.main)
        self._waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self.optimizer = build_adamw(model, config.optim)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay is not None else None
        size = config.model.image_size
        self.pixels = Crops(images, size=size, crop_size=None, seed=config.seed)
        self.valid_pixels = Crops(valid, size=size, crop_size=None, seed=config.seed) if valid is not None else None
        self.order = Order(len(images), config.batch_size, seed=config.seed, views=2 if config.mirror else 1)
        self.timesteps = Timesteps(config.timesteps, len(self.diffusion), config.batch_size, seed=config.seed)

    def step(self, step: int) -> loop.Values:
        """Forward, backward and AdamW over this process's rows of one batch, in ``accumulation`` parts."""
        lr = learning_rate(self.config.optim, step, self.steps)
        set_learning_rate(self.optimizer, lr)
        self.model.train()
        indices, mirrored = self.order.batch(step)
        t_B, weights_B = self.timesteps.draw(step)
        labels_B = self._labels(self.images, indices)
        if labels_B is not None:
            labels_B = drop_labels(labels_B, self.model, seeded("labels", self.config.seed, step))
        values: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for part in self.rows:
            with self._waiting():
                x_BCHW = self._photographs(self.pixels, step, indices[part], mirrored[part])
            sources = [seeded("noise", self.config.seed, step, int(row), device=self.device) for row in part]
            noise = normal(x_BCHW.shape, sources, self.device)
            with self.parallel.accumulate(last=part is self.rows[-1]):
                own_B = None if labels_B is None else labels_B[part]
                found = self._losses(x_BCHW, t_B[part], noise, own_B)
                means = _means(found, weights_B[part].to(self.device), len(self.rows))
                means["loss"].backward()
            losses.append(found.loss.detach())
            values = {name: values.get(name, 0) + mean.detach() for name, mean in means.items()}
        grad_norm = clip_gradients(self.model.parameters(), self.config.optim.grad_clip)
        applied = self.guard.allows(step, grad_norm, self.describe)
        if applied:
            self.optimizer.step()
        self.parallel.clear_gradients(self.optimizer, len(self.rows))
        if applied and self.ema is not None:
            self.ema.update(self.model)
        if applied and self.timesteps.learns:
            self._learn_timesteps(t_B, losses)
        found_values: dict[str, float | Tensor] = {**values, "grad_norm": grad_norm} if applied else {}
        return {**found_values, "lr": lr, **({"skipped": float(not applied)} if self.guard.skips else {})}

    def _learn_timesteps(self, t_B: Tensor, losses: list[Tensor]) -> None:
        """Tell the losses of the whole batch, in its order."""
        for part, losses_b in zip(self.rows, losses, strict=True):
            first = int(part[0]) - self.world.rank * len(part)
            whole_b = self.world.joined_rows(losses_b)
            self.timesteps.update(t_B[first : first + len(whole_b)], whole_b.cpu())

    def _labels(self, images: ImageSet, indices: Any) -> Tensor | None:
        """int64 [B] on the host, None for a model without classes."""
        return None if self.config.model.num_classes is None else torch.from_numpy(images.labels[indices])

    def _photographs(self, pixels: Crops, step: int, indices: Any, mirrored: Any) -> Tensor:
        """fp32 [B, 3, H, W] in [-1, 1] on the device."""
        x_BCHW = pixels.batch(step, indices, mirrored, whole=False)
        return x_BCHW.to(self.device, memory_format=torch.channels_last, non_blocking=True)

    def _losses(self, x_BCHW: Tensor, t_B: Tensor, noise: Tensor, labels_B: Tensor | None) -> Losses:
        labels_B = None if labels_B is None else labels_B.to(self.device, non_blocking=True)

        def run(noisy_BCHW: Tensor, times_B: Tensor) -> Tensor:
            with self.parallel.autocast():  # the network alone: the process stays in fp32
                output: Tensor = self.parallel.forward(noisy_BCHW, times_B, labels_B)
            return output

        return self.diffusion.losses(run, x_BCHW, t_B.to(self.device), noise)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Mean losses over at most ``eval_images`` validation images (evenly spaced), of the averaged weights where
        there are any; each image at its own diffusion step and noise, the same at every evaluation of every run."""
        if self.valid is None or self.valid_pixels is None:
            return {}
        world, count = self.world, min(len(self.valid), self.config.eval_images)
        chosen = np.unique(np.linspace(0, len(self.valid) - 1, count).astype(np.int64))
        count = len(chosen)
        even_B = (torch.randperm(count, generator=seeded("validation steps")) + 0.5) / count
        t_B = (even_B * len(self.diffusion)).long()
        size = max(1, self.config.batch_size // (self.config.accumulation * world.size))
        sums = torch.zeros(4, dtype=torch.float64)  # of loss, mse, vb; images
        self.model.eval()
        with self._averaged():
            for first in range(0, count, size * world.size):
                start = first + world.rank * size
                places = np.arange(count)[start : start + size]
                # Sharded weights are gathered by all processes or by none: one without images goes along.
                shown = places if len(places) else np.arange(1)
                x_BCHW = self._photographs(self.valid_pixels, 0, chosen[shown], np.zeros_like(shown))
                sources = [seeded("validation noise", int(place), device=self.device) for place in shown]
                labels_B = self._labels(self.valid, chosen[shown])
                found = self._losses(x_BCHW, t_B[shown], normal(x_BCHW.shape, sources, self.device), labels_B)
                if len(places):
                    totals = [float(each.double().sum()) if each is not None else 0.0 for each in found]
                    sums += torch.tensor([*totals, len(places)], dtype=torch.float64)
            self.parallel.reshard()
        *totals, images = world.sum(sums).tolist()
        names = [f"valid_{name}" for name, each in zip(Losses._fields, found, strict=True) if each is not None]
        held = [total / images for total, each in zip(totals, found, strict=True) if each is not None]
        return dict(zip(names, held, strict=True))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the model's own while the block runs."""
        if self.ema is None:
            yield
            return
        places = {name: local(parameter.detach()) for name, parameter in self.model.named_parameters()}
        own = {name: place.clone() for name, place in places.items()}
        try:
            for name, average in self.ema.averages.items():
                places[name].copy_(local(average))
            yield
        finally:
            for name, place in places.items():
                place.copy_(own[name])

    def describe(self, step: int) -> str:
        """The images of a step in words."""
        paths = [self.images.paths[index] for index in self.order.batch(step)[0]]
        return batch_names(range(len(paths)), [path.relative_to(self.images.root).as_posix() for path in paths])

    def meters(self) -> Meters | None:
        """Begin to meter what follows, where the config asks for it. All processes call it."""
        if not self.config.meters:
            return None
        rate = matmul_flops_per_s(self.device, self.config.precision)
        total = float(self.world.sum(torch.tensor(rate, dtype=torch.float64)))
        batch = self.config.batch_size
        flops = batch * step_flops(self.config)
        meters = Meters(batch, flops, self.device, total, done=self.done, unit="images")
        self._waiting = meters.data
        return meters

    def notes(self) -> dict[str, Any]:
        """JSON values that later steps depend on."""
        return {"guard": self.guard.state_dict()}

    def take_notes(self, notes: dict[str, Any]) -> None:
        """Take up what :meth:`notes` gave."""
        self.guard.load_state_dict(notes.get("guard", {}))

    def state_dict(self) -> dict[str, Any]:
        """Weights, AdamW's tensors by parameter name, the EMA, and what the drawing of diffusion steps has learned."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }
        if self.ema is not None:
            state["ema"] = dict(self.ema.averages)
        if self.timesteps.learns:
            state["timesteps"] = {"losses": self.timesteps.losses_TS, "seen": self.timesteps.seen_T}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state in; tensors that already are ours stay as they are."""
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        if self.timesteps.learns:
            self.timesteps.losses_TS.copy_(state["timesteps"]["losses"])
            self.timesteps.seen_T.copy_(state["timesteps"]["seen"])

    def export(self, folder: Path) -> None:
        """Write the averaged weights where there are any, else the weights."""
        weights = gathered(self.model.state_dict(), self.world)
        if self.ema is not None:
            weights |= gathered(self.ema.averages, self.world)
        self.world.on_main(lambda: self._write(weights, folder))

    def _write(self, weights: dict[str, Tensor], folder: Path) -> None:
        with torch.device("meta"):
            model = UNet(self.model.config)
        model.load_state_dict(weights, assign=True)
        training = {"recipe": self.config.recipe, "steps": self.done, "ema": self.ema is not None}
        classes = () if self.config.model.num_classes is None else self.images.classes
        save_iddpm(folder, model, classes=classes, extra={"training": training})


def _means(found: Losses, weights_B: Tensor, parts: int) -> dict[str, Tensor]:
    """The weighted means of a part of the batch, as shares of the batch's."""
    each = {name: losses_B for name, losses_B in found._asdict().items() if losses_B is not None}
    return {name: (losses_B * weights_B).mean() / parts for name, losses_B in each.items()}


def step_flops(config: IDDPMTrainConfig) -> int:
    """Matrix products and convolutions of one image's forward and backward pass; a multiply-add counts two."""
    side = config.model.image_size
    with torch.device("meta"):
        model = UNet(config.model)
        x_BCHW, times_B = torch.empty(1, 3, side, side), torch.empty(1)
        labels_B = None if config.model.num_classes is None else torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x_BCHW, times_B, labels_B).sum().backward()
    return counter.get_total_flops()


def train_iddpm(
    config: IDDPMTrainConfig,
    data: Path | str,
    out: Path | str,
    *,
    init: Path | str | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    progress: Progress = plain,
) -> loop.RunResult:
    """A whole run: photographs in ``data`` (its splits train and, if there, valid), everything it produces in ``out``.

    ``init`` is a checkpoint of ours to start from, whose class table may be another. The model is in ``out/model``.
    InputError as the parts raise it, and where the classes of the photographs are not as many as the model's.
    """
    check_wandb(config.wandb)
    images = ImageSet(data, "train", size=config.model.image_size)
    valid = None
    if (Path(data) / "valid").is_dir():
        valid = ImageSet(data, "valid", classes=images.classes, size=config.model.image_size)
    if config.model.num_classes not in (None, len(images.classes)):
        raise InputError(
            f"Expected photographs of {config.model.num_classes} classes in {data}, found {len(images.classes)} "
            f"({', '.join(images.classes)}): --set model.num_classes={len(images.classes)}."
        )
    inputs = {"data": fingerprint(images), "init": digest(init) if init is not None else None}
    with (
        joined(config.device) as world,
        memory_advice(config, world.size),
        RunFolder.open(
            out,
            task="iddpm",
            config=to_dict(config),
            inputs=inputs,
            resume=resume,
            defaults=defaults(config),
            world=world,
        ) as folder,
    ):
        seed_everything(config.seed)
        model = UNet(config.model).to(world.device)
        if init is not None:
            start_from(model, load_iddpm(init))
        seed_process(config.seed, world.rank)
        steps = config.total_steps(len(images))
        task = IDDPMTask(model, config, images, steps=steps, valid=valid, world=world)
        return loop.run_as(config, task, folder, steps=steps, max_minutes=max_minutes, progress=progress)
