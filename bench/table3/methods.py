"""The two methods as the comparison sees them: trained for so many minutes, sampled with a setting."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from retinar.bench.baselines.iddpm import generate as diffusion
from retinar.bench.baselines.iddpm.checkpoint import load_iddpm
from retinar.bench.baselines.iddpm.recipes import IDDPM_RECIPES, iddpm_recipe
from retinar.bench.baselines.iddpm.sampler import IDDPMSampler
from retinar.bench.baselines.iddpm.train_config import IDDPMTrainConfig
from retinar.bench.baselines.iddpm.training import IDDPMTask, train_iddpm
from retinar.bench.baselines.iddpm.unet import UNet
from retinar.engine.checkpoint import is_folder, load_gpt, load_tokenizer, read_config
from retinar.engine.errors import InputError
from retinar.engine.generate import generate_folder
from retinar.engine.progress import Progress, plain
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import recipes
from retinar.train.budget import affordable_steps, seconds_per_step, short_average
from retinar.train.config import apply_overrides
from retinar.train.data.images import ImageSet
from retinar.train.metrics_log import read_metrics
from retinar.train.released import VARIANTS, Release, release
from retinar.train.state import read_run

Setting = Mapping[str, Any]
"""Sampling parameters by name."""
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
"""Guidance of our method, tried on the valid split: what the paper explores."""
BASELINE_GUIDANCE = (1.0, 1.5)
DIFFUSION_STEPS = {"cuda": 50, "cpu": 25}
BASELINES: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "cuda": {256: ("iddpm-256",), 128: ("iddpm-128",)},
    "cpu": {128: ("iddpm-cpu", "iddpm-cpu-wide"), 256: ("iddpm-256-cpu",)},
}
"""Recipes of the baseline by device and size; the better one counts."""


@dataclass
class Job:
    """What every stage shares. ``data``: the prepared photographs, once they are there."""

    out: Path
    device: str
    budget: float
    sets: tuple[str, ...] = ()
    vgg: Path | None = None
    seed: int = 0
    progress: Progress = field(default=plain)
    data: Path = Path()

    def overrides(self, part: str) -> list[str]:
        """The changes to the recipe of ``part``."""
        return [text.partition(".")[2] for text in self.sets if text.startswith(f"{part}.")]


class Method(Protocol):
    """One side of the table."""

    @property
    def key(self) -> str:
        """Its name in files."""

    @property
    def title(self) -> str:
        """Its name in tables."""

    @property
    def recipes(self) -> Sequence[str]:
        """What is trained; the better one counts."""

    def image_size(self, job: Job) -> int:
        """Side of its images in pixels."""

    def settings(self, job: Job) -> Sequence[Setting]:
        """The sampling parameters to choose from; the first where nothing is tuned."""

    def check(self, labels: Iterable[str]) -> None:
        """InputError unless a given checkpoint knows these classes."""

    def train(self, job: Job, recipe: str, minutes: float) -> dict[str, Any]:
        """Train for so long, which is what is left of ``job.budget`` -> {"model": folder, "steps", "images_seen",
        "parameters", "image_size"}."""

    def sample(self, job: Job, model: Path, setting: Setting, counts: Mapping[str, int], out: Path) -> None:
        """Images of every class into ``out``, those that are missing."""


@dataclass(frozen=True)
class Autoregressive:
    """Our method: tokenizer, codes and transformer by ``retinar.train.released``; or a trained checkpoint."""

    variant: str
    given: Path | None = None
    tokenizer: Path | None = None
    key: str = "autoregressive"
    title: str = "autoregressive"

    @property
    def recipes(self) -> Sequence[str]:
        return ("given",) if self.given is not None else ("+".join(VARIANTS[self.variant]),)

    def image_size(self, job: Job) -> int:
        if self.given is not None or self.tokenizer is not None:
            return int(decoder_of(self.given, self.tokenizer).config.image_size)
        name = VARIANTS[self.variant][0]
        config = apply_overrides(recipes.tokenizer_recipe(name), job.overrides("tokenizer"))
        return int(config.model.image_size)

    def settings(self, job: Job) -> Sequence[Setting]:
        if self.given is not None:
            config = load_gpt(self.given).config
        else:
            config = apply_overrides(recipes.gpt_recipe(VARIANTS[self.variant][1]), job.overrides("gpt")).model
        return [{"cfg_scale": scale} for scale in GUIDANCE if scale == 1 or config.null_class]

    def check(self, labels: Iterable[str]) -> None:
        if self.given is not None:
            _check_classes(self.given, labels)

    def train(self, job: Job, recipe: str, minutes: float) -> dict[str, Any]:
        if self.given is not None:
            decoder = decoder_of(self.given, self.tokenizer)
            found = _given(self.given, [load_gpt(self.given), decoder], decoder.config.image_size)
            return {**found, "without": "the tokenizer's training"}
        out = job.out / self.key / recipe
        release(
            Release(
                data=job.data,
                out=out,
                variant=self.variant,
                device=job.device,
                minutes=job.budget,
                perceptual_weights=None if job.vgg is None else str(job.vgg),
                sets=tuple(text for text in job.sets if text.partition(".")[0] in ("tokenizer", "gpt")),
                count=1,
                tokenizer=self.tokenizer,
                overrun=1.0,
                stretch=True,
                left=minutes,
            ),
            job.progress,
        )
        plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
        seen = {
            part: done["steps"] * int(read_run(out / part)["config"]["batch_size"])
            for part, done in plan["done"].items()
        }
        steps = ", ".join(f"{part} {done['steps']:,} steps" for part, done in plan["done"].items())
        model = load_gpt(out / "model")
        decoder = load_tokenizer(out / "model" / "tokenizer")
        return {
            "model": out / "model",
            "steps": steps,
            "images_seen": seen["gpt"],
            "images_seen_by_tokenizer": seen.get("tokenizer", 0),
            "parameters": sum(p.numel() for part in (model, decoder) for p in part.parameters()),
            "image_size": decoder.config.image_size,
        }

    def sample(self, job: Job, model: Path, setting: Setting, counts: Mapping[str, int], out: Path) -> None:
        tokenizer = self.tokenizer if self.given is not None else None  # one that is trained has its own inside
        sampler = Sampler.from_pretrained(model, tokenizer, job.device)
        where: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "progress": job.progress}
        generate_folder(sampler, out, list(counts.items()), seed=job.seed, **where, **setting)


@dataclass(frozen=True)
class Baseline:
    """iDDPM, by the commands that train and sample our method too; or a trained checkpoint."""

    recipes: Sequence[str]
    given: Path | None = None
    key: str = "iddpm"
    title: str = "iDDPM"

    def image_size(self, job: Job) -> int:
        if self.given is not None:
            return int(load_iddpm(self.given).config.image_size)
        return int(self._config(job, self.recipes[0]).model.image_size)

    def _config(self, job: Job, recipe: str) -> IDDPMTrainConfig:
        return apply_overrides(iddpm_recipe(recipe), [f"device={job.device}", *job.overrides("iddpm")])

    def settings(self, job: Job) -> Sequence[Setting]:
        steps = DIFFUSION_STEPS["cuda" if job.device.startswith("cuda") else "cpu"]
        config = self._config(job, self.recipes[0]).model if self.given is None else load_iddpm(self.given).config
        steps = min(steps, config.diffusion_steps)
        scales = [scale for scale in BASELINE_GUIDANCE if scale == 1 or config.null_label is not None]
        return [{"cfg_scale": scale, "steps": steps, "method": "ancestral"} for scale in scales]

    def check(self, labels: Iterable[str]) -> None:
        if self.given is not None:
            _check_classes(self.given, labels)

    def train(self, job: Job, recipe: str, minutes: float) -> dict[str, Any]:
        if self.given is not None:
            network = load_iddpm(self.given)
            return _given(self.given, [network], network.config.image_size)
        out = job.out / self.key / recipe
        config = self._config(job, recipe)
        if (out / "config.json").is_file():
            begun = read_run(out)["config"]
            config = dataclasses.replace(config, steps=begun["steps"], epochs=None, ema_decay=begun["ema_decay"])
        else:
            config = self._fitted(job, config, minutes)
        result = train_iddpm(config, job.data, out, resume=out.exists(), max_minutes=minutes, progress=job.progress)
        if result.model is None:
            raise KeyboardInterrupt
        model = load_iddpm(result.model)
        return {
            "model": result.model,
            "steps": f"{result.step:,} steps",
            "images_seen": result.step * config.batch_size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_size": model.config.image_size,
        }

    @staticmethod
    def _fitted(job: Job, config: IDDPMTrainConfig, minutes: float) -> IDDPMTrainConfig:
        """The recipe with the number of steps that the time pays for, and an average as short as so few need; what is
        set by hand stays."""
        by_hand = {text.partition("=")[0] for text in job.overrides("iddpm")}
        if "steps" not in by_hand:
            images = ImageSet(job.data, "train", size=config.model.image_size)
            model = UNet(config.model).to(job.device)
            task = IDDPMTask(model, config, images, steps=config.total_steps(len(images)))
            steps = affordable_steps(minutes, [(1.0, seconds_per_step(task, range(4)))])
            config = dataclasses.replace(config, steps=steps, epochs=None)
        if "ema_decay" not in by_hand and config.steps is not None:
            config = dataclasses.replace(config, ema_decay=short_average(config.ema_decay, config.steps))
        return config

    def sample(self, job: Job, model: Path, setting: Setting, counts: Mapping[str, int], out: Path) -> None:
        sampler = IDDPMSampler.from_pretrained(model, device=job.device)
        diffusion.generate_folder(
            sampler, out, list(counts.items()), seed=job.seed, model=model, progress=job.progress, **setting
        )


def methods(
    autoregressive: Path | None,
    tokenizer: Path | None,
    iddpm: Path | None,
    names: Sequence[str],
    job: Job,
    size: int | None,
) -> tuple[Autoregressive, Baseline]:
    """Both methods, of one image size. ``names``: recipes of the baseline; none: those for the device and size.

    Raises InputError where their sizes differ, or no recipe is known for the size.
    """
    variant = "gpu" if job.device.startswith("cuda") else "cpu"
    ours = Autoregressive(variant, autoregressive, tokenizer)
    side = ours.image_size(job)
    if size is not None and size != side:
        what = "recipe" if autoregressive is None else "checkpoint"
        raise InputError(
            f"Expected images of {size} px, found {side} px in our method's {what}: give another --size, or "
            f"--set tokenizer.model.image_size={size}."
        )
    if iddpm is None and not names:
        known = BASELINES["cuda" if variant == "gpu" else "cpu"]
        if side not in known:
            raise InputError(
                f"Expected a recipe of the baseline for {side} px, found none for this device: name one with --recipes "
                f"({', '.join(IDDPM_RECIPES)})."
            )
        names = known[side]
    theirs = Baseline(("given",) if iddpm is not None else tuple(names), iddpm)
    for name in theirs.recipes:
        found = Baseline((name,), iddpm).image_size(job)
        if found != side:
            raise InputError(
                f"Expected a baseline of {side} px, as our method has, found {found} px: choose another recipe or size."
            )
    return ours, theirs


def decoder_of(model: Path | None, tokenizer: Path | None) -> VQTokenizer:
    """The tokenizer that is named, else the one inside the checkpoint."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    assert model is not None
    if not (model / "tokenizer").is_dir():
        raise InputError(f"Expected a tokenizer inside {model}, found none: train with --tokenizer, or name it.")
    return load_tokenizer(model / "tokenizer")


def _given(path: Path, parts: Sequence[nn.Module], size: int) -> dict[str, Any]:
    """What is known about a checkpoint trained elsewhere; more where it still lies in the folder of its run."""
    found: dict[str, Any] = {
        "model": path,
        "steps": None,
        "images_seen": None,
        "minutes": None,
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "image_size": size,
    }
    run = path.resolve().parent
    if not is_folder(path) or not all((run / name).is_file() for name in ("config.json", "metrics.jsonl")):
        return found
    try:
        stored = read_run(run)
        timed = [line for line in read_metrics(run / "metrics.jsonl") if "seconds" in line]
        steps = int(read_config(path)["training"]["steps"])
        lengths = np.diff([0, *(line["step"] for line in timed[:-1]), steps])  # the log may end some steps before
        seconds = float(sum(n * line["seconds"] for n, line in zip(lengths, timed, strict=True)))
        recipe, batch_size = stored["config"]["recipe"], int(stored["config"]["batch_size"])
    except (ValueError, KeyError, TypeError):  # the folder of something else
        return found
    told = {"steps": f"{stored['task']} {steps:,} steps of recipe {recipe}", "images_seen": steps * batch_size}
    return {**found, **told, "minutes": round(seconds / 60, 2)}


def _check_classes(path: Path, labels: Iterable[str]) -> None:
    known = read_config(path).get("classes", []) if is_folder(path) else []
    if missing := [label for label in labels if label not in known]:
        raise InputError(
            f"Expected a checkpoint of the class {missing[0]} in {path}, found {', '.join(known) or 'no class names'}: "
            "give one that was trained on photographs of these classes."
        )
