"""Training the tokenizer on photographs: whole or its decoder alone, from scratch or from a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retinar.engine.checkpoint import digest, load_tokenizer, save_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, plain
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import loop
from retinar.train.config import TokenizerTrainConfig, defaults, to_dict
from retinar.train.crops import Crops, fingerprint, random_square
from retinar.train.data.images import ImageSet
from retinar.train.device import autocast, compile_parts, memory_advice
from retinar.train.flops import TokenizerFlops
from retinar.train.guard import Guard, batch_names
from retinar.train.losses import (
    LossParts,
    adversarial_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
    total_loss,
)
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
from retinar.train.parallel import gathered, wrap
from retinar.train.patchgan import PatchGAN
from retinar.train.perceptual import PerceptualLoss
from retinar.train.reconstruction import reconstruction_figures
from retinar.train.revival import CodeRevival
from retinar.train.rng import seed_everything, seed_process
from retinar.train.state import RunFolder
from retinar.train.world import World, joined


class TokenizerTask:
    """The tokenizer, its discriminator, their optimizers and the photographs: what the loop drives.

    ``model`` is trained in place where it lies; ``perceptual`` None leaves that loss out; ``sheets`` is where
    evaluations put ``step-0001000.png``, photographs over their reconstructions (None: nowhere).
    """

    name = "tokenizer"
    criterion = "valid_l2"

    def __init__(
        self,
        model: VQTokenizer,
        config: TokenizerTrainConfig,
        images: ImageSet,
        *,
        steps: int,
        valid: ImageSet | None = None,
        perceptual: PerceptualLoss | None = None,
        sheets: Path | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.config, self.valid, self.perceptual, self.sheets = model, config, valid, perceptual, sheets
        self.steps, self.done = steps, 0
        if config.scope == "whole" and config.quantize_from >= steps:
            raise InputError(
                f"Expected quantize_from below the run's {steps} steps, found {config.quantize_from}: "
                "the codebook would never be used, set it lower."
            )
        # A decoder alone learns from codes in any case.
        self.quantize_from = config.quantize_from if config.scope == "whole" else 0
        self.device = next(model.parameters()).device
        self.images, self.world = images, world or World(self.device)
        self.crops = Crops(images, size=model.config.image_size, crop_size=config.crop_size, seed=config.seed)
        # A view is the image or its mirror, drawn anew in every pass.
        self._check_share()
        self.order = Order(len(images), config.batch_size, seed=config.seed, views=2 if config.mirror else 1)
        if config.scope == "decoder":
            for part in (model.encoder, model.quant_conv, model.quantize):
                part.requires_grad_(False)
        if config.compile:
            compile_parts([model.encoder, model.decoder], self.device)
        self.parallel = wrap(model, [model.encoder, model.decoder], config, self.world, cast_weights=False)
        self.guard = Guard(config.guard, config.spike, tells=self.world.main)
        self._waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self.optimizer = build_adamw(model, config.optim)
        self.ema = EMA(model, config.ema_decay) if config.ema_decay is not None else None
        self.revival: CodeRevival | None = None
        if (config.revive_after is not None or self.quantize_from > 0) and config.scope == "whole":
            self.revival = CodeRevival(
                model.quantize, after=config.revive_after, start=self.quantize_from, seed=config.seed
            )
        self.discriminator: PatchGAN | None = None
        if config.disc_weight > 0:
            self.discriminator = PatchGAN(config.disc_channels, config.disc_layers).to(self.device)
            if self.world.size > 1 and self.device.type == "cuda":  # statistics of the whole batch; torch has it there
                self.discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(self.discriminator)
            # Small, so it is on every process whatever the mode.
            replicated = dataclasses.replace(config, parallel="ddp", replicas=None)
            self.judge = wrap(self.discriminator, [], replicated, self.world)
            self.disc_optimizer = build_adamw(self.discriminator, config.disc_optim)

    def step(self, step: int) -> loop.Values:
        """One step of the tokenizer, then, from ``disc_start`` on, one of the discriminator on the same images."""
        rate = learning_rate(self.config.optim, step, self.steps)
        set_learning_rate(self.optimizer, rate)
        self.model.train()
        indices, mirrored = self.order.batch(step)
        whole = self._whole(step)
        share = self.world.rank, self.world.size
        with self._waiting():
            images_BCHW = self.crops.batch(step, indices, mirrored, whole=whole, share=share)
            images_BCHW = images_BCHW.to(self.device, non_blocking=True)
        adversary = self.discriminator if adversarial_weight(self.config, step) > 0 else None

        values: dict[str, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        usage = 0.0
        quantized = step >= self.quantize_from
        chunks = images_BCHW.chunk(self.config.accumulation)
        for number, part_BCHW in enumerate(chunks, 1):
            weight = len(part_BCHW) / len(images_BCHW)
            with self.parallel.accumulate(last=number == len(chunks)):
                with self.parallel.autocast():
                    output = self.parallel.forward(part_BCHW, quantized=quantized, track=False)
                    parts = self._parts(output, part_BCHW, adversary, step)
                loss, terms = total_loss(parts, self.config, step)
                (weight * loss).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                values[name] = values.get(name, torch.zeros_like(value)) + weight * value
            pairs.append((part_BCHW, output.reconstruction.detach()))
            if quantized:
                codes_Bhw = self.world.joined_rows(output.codes_Bhw)
                usage = self.model.quantize.track(codes_Bhw)
                if self.revival is not None:
                    self.revival.note(step, codes_Bhw)
        norm = clip_gradients(self._trained(), self.config.optim.grad_clip)
        applied = self.guard.allows(step, norm, self.describe)
        if applied:
            self.optimizer.step()
        self.parallel.clear_gradients(self.optimizer, self.config.accumulation)
        if applied and self.ema is not None:
            self.ema.update(self.model)
        if self.revival is not None and self.revival.due(step):
            self._revive(step, images_BCHW)
        if applied and adversary is not None:
            values |= self._step_discriminator(adversary, pairs, step)
        self.done = step + 1
        found = {**values, "grad_norm": norm} if applied else {}
        return {**found, "lr": rate, "usage": usage, **({"skipped": float(not applied)} if self.guard.skips else {})}

    def _whole(self, step: int) -> bool:
        return step >= self.config.whole_from * self.steps

    def _check_share(self) -> None:
        """InputError where the processes would get unequal shares of a batch, or cannot do what the config asks for."""
        config, size = self.config, self.world.size
        own_rows(config, self.world)
        whole = self.crops.whole_images(config.batch_size)
        if config.whole_from < 1 and whole % size:
            raise InputError(
                f"Expected the {whole} whole images of a step to be a multiple of the {size} processes: set batch_size."
            )
        revives = config.scope == "whole" and (config.revive_after is not None or self.quantize_from > 0)
        if size > 1 and config.parallel != "ddp" and revives:
            raise InputError(
                f"Expected parallel=ddp with revive_after or quantize_from, found {config.parallel}: they rewrite the "
                "codebook, which must be whole in every process."
            )

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
        side = self.config.crop_size or self.model.config.image_size
        tokens = self.config.batch_size * (side // self.model.config.downsample) ** 2
        flops = TokenizerFlops(self.config)
        meters = Meters(tokens, flops, self.device, total, done=self.done)
        self._waiting = meters.data
        return meters

    def notes(self) -> dict[str, Any]:
        """JSON values that later steps depend on."""
        return {"guard": self.guard.state_dict()}

    def take_notes(self, notes: dict[str, Any]) -> None:
        """Take up what :meth:`notes` gave."""
        self.guard.load_state_dict(notes.get("guard", {}))

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _parts(self, output: Any, images_BCHW: Tensor, adversary: PatchGAN | None, step: int) -> LossParts:
        """The terms of the loss for one part of the batch."""
        made_BCHW = output.reconstruction
        perceptual = adversarial = None
        if self.perceptual is not None and step >= self.config.perceptual_from and self.config.perceptual_weight > 0:
            side, share = images_BCHW.shape[-1], self.config.perceptual_side
            rows, columns = random_square(side, share, seed=self.config.seed, step=step)
            perceptual = self.perceptual(made_BCHW[:, :, rows, columns], images_BCHW[:, :, rows, columns])
        if adversary is not None:
            adversary.train().requires_grad_(False)  # the gradient passes through it, not into it
            adversarial = generator_loss(adversary(made_BCHW))
            adversary.requires_grad_(True)
        kind = self.config.reconstruction_loss
        return LossParts(
            reconstruction_loss(made_BCHW, images_BCHW, kind),
            perceptual,
            output.codebook_loss,
            output.commitment_loss,
            adversarial,
        )

    def _step_discriminator(
        self, adversary: PatchGAN, pairs: list[tuple[Tensor, Tensor]], step: int
    ) -> dict[str, Tensor]:
        """One step of the discriminator on photographs and the reconstructions already made of them."""
        set_learning_rate(self.disc_optimizer, learning_rate(self.config.disc_optim, step, self.steps))
        total = sum(len(images) for images, _ in pairs)
        values = {name: torch.zeros((), device=self.device) for name in ("disc_loss", "logits_real", "logits_fake")}
        for number, (images_BCHW, made_BCHW) in enumerate(pairs, 1):
            share = len(images_BCHW) / total
            with self.judge.accumulate(last=number == len(pairs)):
                with autocast(self.device, self.config.precision):
                    real, made = self.judge.forward(images_BCHW), self.judge.forward(made_BCHW)
                # Times the weight, as upstream's: Adam does not see it, the clipping does.
                loss = adversarial_weight(self.config, step) * discriminator_loss(real, made)
                (share * loss).backward()
            for name, value in {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": made.mean()}.items():
                values[name] += share * value.detach().float()
        norm = clip_gradients(adversary.parameters(), self.config.disc_optim.grad_clip)
        if self.guard.skips and not math.isfinite(float(norm)):
            self.disc_optimizer.zero_grad(set_to_none=True)
            return {}
        self.disc_optimizer.step()
        self.judge.clear_gradients(self.disc_optimizer, self.config.accumulation)
        return values

    @torch.no_grad()
    def _revive(self, step: int, images_BCHW: Tensor) -> None:
        assert self.revival is not None
        name, weight_KC = "quantize.embedding.weight", self.model.quantize.embedding.weight
        moments = self.optimizer.state[weight_KC]
        rows = [(moments["exp_avg"], False), (moments["exp_avg_sq"], False)]
        if self.ema is not None:
            rows.append((self.ema.averages[name], True))
        with autocast(self.device, self.config.precision):
            latents_BChw = self.world.joined_rows(self.model.latents(images_BCHW))
        self.revival.revive(step, latents_BChw, rows)

    def averaged(self) -> VQTokenizer | None:
        """The model to use: with the averaged weights where there are any; in evaluation mode, apart from training. In
        the main process, None elsewhere; all processes call it."""
        weights = gathered(self.model.state_dict(), self.world)
        if self.ema is not None:
            weights |= gathered(self.ema.averages, self.world)
        if not self.world.main:
            return None
        with torch.device("meta"):
            model = VQTokenizer(self.model.config)
        model.load_state_dict(weights, assign=True)
        return model.to(self.device).eval()

    def evaluate(self, step: int) -> dict[str, float]:
        """Reconstruction of at most ``eval_images`` whole validation images, see :func:`reconstruction_figures`; the
        main process makes them, the others wait."""
        if self.valid is None:
            return {}
        model, valid, config = self.averaged(), self.valid, self.config
        sheet = self.sheets / f"step-{step:07d}.png" if self.sheets is not None else None

        def figures() -> dict[str, float]:
            assert model is not None
            return reconstruction_figures(
                model, valid, count=config.eval_images, precision=config.precision, sheet=sheet
            )

        return {f"valid_{name}": value for name, value in self.world.on_main(figures).items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer tensors by parameter name, and what EMA, revival and discriminator add."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }
        if self.ema is not None:
            state["ema"] = dict(self.ema.averages)
        if self.revival is not None:
            state["revival"] = {"last_used": self.revival.last_used_K}
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["disc_optimizer"] = optimizer_state(self.discriminator, self.disc_optimizer)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state in; tensors that already are ours stay as they are."""
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        if self.revival is not None:
            self.revival.last_used_K.copy_(state["revival"]["last_used"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            load_optimizer_state(self.discriminator, self.disc_optimizer, state["disc_optimizer"])

    def export(self, folder: Path) -> None:
        """Write our folder; the discriminator's weights lie beside the tokenizer's, for a later fine-tuning.

        InputError where the run has not come to using its codebook: such a model is no tokenizer yet.
        """
        if self.done < self.quantize_from:
            raise InputError(
                f"Expected at least {self.quantize_from} steps before a tokenizer can be written (quantize_from), "
                f"found {self.done}: go on with --resume."
            )
        training = {"recipe": self.config.recipe, "steps": self.done, "ema": self.ema is not None}
        if self.perceptual is not None:
            training["vgg16_sha256"] = self.perceptual.digest
        weights = self.discriminator.state_dict() if self.discriminator is not None else None
        model = self.averaged()

        def write() -> None:
            assert model is not None
            save_tokenizer(folder, model, extra={"training": training}, discriminator=weights)

        self.world.on_main(write)


def train_tokenizer(
    config: TokenizerTrainConfig,
    data: Path | str,
    out: Path | str,
    *,
    init: Path | str | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    progress: Progress = plain,
) -> loop.RunResult:
    """A whole run: photographs in ``data`` (its splits train and, if there, valid), everything it produces in ``out``.

    ``init`` is a checkpoint to start from (recipes with start "checkpoint", and decoder-only training, need one). The
    model is in ``out/model``, reconstructions of validation images in ``out/reconstructions``. InputError as the
    parts raise it.
    """
    check_wandb(config.wandb)
    if init is None and (config.start == "checkpoint" or config.scope == "decoder"):
        why = f"recipe {config.recipe}" if config.start == "checkpoint" else "scope=decoder"
        raise InputError(f"Expected a checkpoint to start from for {why}, found none: give it with --init PATH.")
    images = ImageSet(data, "train", size=config.model.image_size)
    valid = ImageSet(data, "valid", size=config.model.image_size) if (Path(data) / "valid").is_dir() else None
    perceptual = None
    if config.perceptual == "vgg":
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        perceptual = PerceptualLoss(config.perceptual_weights, dtype=dtype)
    inputs = {
        "data": fingerprint(images),
        "init": digest(init) if init is not None else None,
        "vgg16": perceptual.digest if perceptual is not None else None,
    }
    with (
        joined(config.device) as world,
        memory_advice(config, world.size),
        RunFolder.open(
            out,
            task="tokenizer",
            config=to_dict(config),
            inputs=inputs,
            resume=resume,
            defaults=defaults(config),
            world=world,
        ) as folder,
    ):
        seed_everything(config.seed)
        model = VQTokenizer(config.model).to(world.device)
        if init is not None:
            model.load_state_dict(load_tokenizer(init, config=config.model).state_dict())
        if perceptual is not None:
            perceptual = perceptual.to(world.device)
        steps = config.total_steps(len(images))
        sheets = folder.path / "reconstructions"
        task = TokenizerTask(
            model, config, images, steps=steps, valid=valid, perceptual=perceptual, sheets=sheets, world=world
        )
        seed_process(config.seed, world.rank)
        return loop.run_as(config, task, folder, steps=steps, max_minutes=max_minutes, progress=progress)
