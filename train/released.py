"""Train the small released model in one go: ``python -m retinar.train.released --data PHOTOGRAPHS --out DIR``.

Stages, each taken up where it stopped when the same command is given again::

    OUT/prepared/    photographs at 256 px (unless --data already is a prepared folder)
    OUT/tokenizer/   the run of recipe vq8-narrow (gpu) or vq8-cpu (cpu)
    OUT/codes/       its codes of train and valid
    OUT/gpt/         the run of recipe fundus-small (gpu) or fundus-cpu (cpu)
    OUT/model/       the release: both in bf16, shards of at most 15 MB, digests, card
    OUT/samples/     images of every class, made with it

``--minutes`` is what the two trainings share: their steps are measured on this machine first, the number of steps is
chosen to fit (never more than the recipe's) and kept in OUT/plan.json, so that the learning rate ends where it should
and a continuation does the same steps. Runs from a bare checkout (PYTHONPATH=.) with torch, numpy, pillow,
safetensors and, for the perceptual loss, lpips.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retinar.engine.checkpoint import digest, load_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.files import write_json
from retinar.engine.generate import generate_folder
from retinar.engine.model import GPT
from retinar.engine.progress import Progress, plain
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import recipes
from retinar.train.budget import affordable_steps, seconds_per_step, short_average
from retinar.train.code_fit import fit_to_codes
from retinar.train.codes import CodeSet, encode_folder
from retinar.train.config import GPTTrainConfig, TokenizerTrainConfig, apply_overrides
from retinar.train.data.images import ImageSet
from retinar.train.data.manifest import MANIFEST
from retinar.train.data.prepare import prepare
from retinar.train.device import pick_device
from retinar.train.export import export_release
from retinar.train.gpt import GPTTask, train_gpt
from retinar.train.loop import RunResult
from retinar.train.perceptual import PerceptualLoss
from retinar.train.state import read_run
from retinar.train.tokenizer import TokenizerTask, train_tokenizer

VARIANTS = {"gpu": ("vq8-narrow", "fundus-small"), "cpu": ("vq8-cpu", "fundus-cpu")}
TOKENIZER_SHARE = 0.5
DISCRIMINATOR_FROM = 0.6
"""Share of the tokenizer's steps made before the discriminator joins."""
MAX_RELEASE_BYTES = 25_000_000


@dataclass(frozen=True)
class Release:
    """What is asked for. ``sets``: ``tokenizer.KEY=VALUE`` and ``gpt.KEY=VALUE``; ``count``: sampled images a class.
    ``tokenizer``: one that is trained already; all minutes are the transformer's then. ``overrun``: a training that
    takes so many times its planned minutes is cut there (the machine became slower). ``stretch``: the minutes are used
    up, with more steps than the recipes have where there is time for them, and averages as short as few steps need.
    ``left``: what earlier calls left of the minutes; None: not counted."""

    data: Path
    out: Path
    variant: str = "gpu"
    device: str = "auto"
    minutes: float = 25.0
    perceptual_weights: str | None = None
    sets: tuple[str, ...] = ()
    count: int = 8
    cfg_scale: float = 2.0
    tokenizer: Path | None = None
    overrun: float = 1.5
    stretch: bool = False
    left: float | None = None

    @property
    def tokenizer_minutes(self) -> float:
        """The tokenizer's part of ``minutes``."""
        return 0.0 if self.tokenizer is not None else TOKENIZER_SHARE * self.minutes

    def limit(self, planned: float) -> float:
        """Minutes after which a training that was planned for so many is cut."""
        return self.overrun * planned if self.left is None else max(0.0, min(self.overrun * planned, self.left))

    def overrides(self, part: str) -> list[str]:
        """The changes to the recipe of ``part`` (tokenizer or gpt)."""
        for text in self.sets:
            if text.partition(".")[0] not in ("tokenizer", "gpt"):
                raise InputError(f"Expected --set tokenizer.KEY=VALUE or gpt.KEY=VALUE, found {text!r}.")
        return [text.partition(".")[2] for text in self.sets if text.startswith(f"{part}.")]


def release(asked: Release, progress: Progress = plain) -> dict[str, Any]:
    """All stages -> summary (paths, steps, bytes, seconds). InputError as the stages raise it; KeyboardInterrupt when
    Ctrl-C stopped a training (it has saved itself)."""
    began = time.monotonic()
    tokenizer_name, gpt_name = VARIANTS[asked.variant]
    plan = _open_plan(asked)

    if asked.tokenizer is not None:
        tokenizer = asked.tokenizer
        prepared = _prepared(asked, load_tokenizer(tokenizer).config.image_size, progress)
    else:
        tokenizer_config = _tokenizer_config(asked, tokenizer_name)
        prepared = _prepared(asked, tokenizer_config.model.image_size, progress)
        at = asked.out / "tokenizer"
        if "tokenizer" not in plan["done"]:
            tokenizer_config = _fit_tokenizer(asked, plan, tokenizer_config, prepared)
            limit = asked.limit(asked.tokenizer_minutes)
            result = train_tokenizer(
                tokenizer_config, prepared, at, resume=at.exists(), max_minutes=limit, progress=progress
            )
            _finish(asked, plan, "tokenizer", result)
        tokenizer = at / "model"

    splits = [split for split in ("train", "valid") if (prepared / split).is_dir()]
    for split in splits:
        encode_folder(prepared, tokenizer, asked.out / "codes" / split, split, device=asked.device, progress=progress)
    codes, valid = (asked.out / "codes" / split for split in ("train", "valid"))

    at = asked.out / "gpt"
    if "gpt" not in plan["done"]:
        gpt_config = _fit_gpt(asked, plan, recipes.gpt_recipe(gpt_name), codes)
        limit = asked.limit(asked.minutes - asked.tokenizer_minutes)
        result = train_gpt(
            gpt_config,
            codes,
            at,
            valid=valid if "valid" in splits else None,
            tokenizer=tokenizer,
            resume=at.exists(),
            max_minutes=limit,
            progress=progress,
        )
        _finish(asked, plan, "gpt", result)

    size = export_release(at / "model", asked.out / "model", variant=asked.variant, stages=plan["done"])
    sampler = Sampler.from_pretrained(asked.out / "model", device=pick_device(asked.device))
    sampled = generate_folder(
        sampler,
        asked.out / "samples",
        [(name, asked.count) for name in sampler.classes],
        cfg_scale=asked.cfg_scale,
        model=asked.out / "model",
        progress=progress,
    )
    fits = "fits" if size <= MAX_RELEASE_BYTES else "does not fit"
    print(f"{asked.out / 'model'}: {size / 1e6:.1f} MB, {fits} into {MAX_RELEASE_BYTES / 1e6:.0f} MB.", file=sys.stderr)
    return {
        "model": str(asked.out / "model"),
        "bytes": size,
        "sheet": str(asked.out / "samples" / "sheet.png"),
        "samples": sampled,
        "done": plan["done"],
        "seconds": round(time.monotonic() - began, 1),
    }


# --- the stages' parts


def _open_plan(asked: Release) -> dict[str, Any]:
    """What OUT/plan.json holds, begun here: steps chosen and stages done. InputError when it is of another release."""
    file = asked.out / "plan.json"
    wanted: dict[str, Any] = {"format": 1, "variant": asked.variant, "sets": list(asked.sets)}
    if asked.tokenizer is not None:
        wanted["tokenizer"] = digest(asked.tokenizer)
    if file.exists():
        try:
            plan = json.loads(file.read_text(encoding="utf-8"))
            same = all(plan[key] == value for key, value in wanted.items()) and isinstance(plan["done"], dict)
            same = same and plan.get("tokenizer") == wanted.get("tokenizer")
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise InputError(
                f"Expected a plan with the same --variant, --tokenizer and --set in {file}, found another: choose "
                "another --out."
            )
        return plan
    if asked.out.is_dir() and any(asked.out.iterdir()):
        raise InputError(f"Expected an empty or a begun --out, found other files in {asked.out}: choose another.")
    if not asked.data.is_dir():
        raise InputError(
            f"Expected a folder of photographs for --data, found none at {str(asked.data)!r}: check the path."
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    plan = {**wanted, "steps": {}, "done": {}}
    write_json(file, plan)
    return plan


def _prepared(asked: Release, size: int, progress: Progress) -> Path:
    if (asked.data / MANIFEST).is_file():
        return asked.data
    prepare(asked.data, asked.out / "prepared", size=size, progress=progress)
    return asked.out / "prepared"


def _tokenizer_config(asked: Release, name: str) -> TokenizerTrainConfig:
    changes = [f"device={asked.device}"]
    if asked.perceptual_weights is not None:
        changes.append(f"perceptual_weights={asked.perceptual_weights}")
    config = apply_overrides(recipes.tokenizer_recipe(name), [*changes, *asked.overrides("tokenizer")])
    if config.perceptual == "vgg" and config.perceptual_weights is None:
        raise InputError(
            "Expected VGG16's weights for the perceptual loss, found none: give them with --perceptual-weights PATH, "
            "or train without with --set tokenizer.perceptual=none."
        )
    return config


def _fit_tokenizer(
    asked: Release, plan: dict[str, Any], config: TokenizerTrainConfig, prepared: Path
) -> TokenizerTrainConfig:
    """``config`` with the number of steps that the time allows."""

    def measure() -> int:
        recipe_steps = config.total_steps(len(images))
        most = None if asked.stretch else recipe_steps
        parts = [(config, 1.0)]
        if config.disc_weight > 0:
            joined = dataclasses.replace(config, disc_start=1)
            alone = dataclasses.replace(config, disc_weight=0.0)
            parts = [(alone, DISCRIMINATOR_FROM), (joined, 1 - DISCRIMINATOR_FROM)]
        first = max(config.quantize_from, config.perceptual_from)  # from then on steps cost most
        costs = []
        for part, share in parts:
            model = VQTokenizer(config.model).to(device)
            task = TokenizerTask(model, part, images, steps=recipe_steps, perceptual=perceptual)
            costs.append((share, seconds_per_step(task, range(first, first + 6))))
        return affordable_steps(asked.tokenizer_minutes, costs, most)

    images = ImageSet(prepared, "train", size=config.model.image_size)
    device = pick_device(config.device)
    perceptual = None
    if "tokenizer" not in plan["steps"] and config.perceptual == "vgg":
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        perceptual = PerceptualLoss(config.perceptual_weights, dtype=dtype).to(device)
    steps = _steps(asked, plan, "tokenizer", config, measure)
    # What the recipe says in steps is meant as a share of its own number of them.
    scale = steps / (recipes.tokenizer_recipe(config.recipe).steps or steps)
    by_hand = {text.partition("=")[0] for text in asked.overrides("tokenizer")}
    marks = {"quantize_from": config.quantize_from, "perceptual_from": config.perceptual_from}
    changes: dict[str, Any] = {name: int(mark * scale) for name, mark in marks.items() if name not in by_hand}
    if "disc_start" not in by_hand:
        changes["disc_start"] = max(1, round(DISCRIMINATOR_FROM * steps))
    return dataclasses.replace(config, steps=steps, **changes)


def _fit_gpt(asked: Release, plan: dict[str, Any], recipe: GPTTrainConfig, folder: Path) -> GPTTrainConfig:
    """The recipe for these codes, with the number of steps that the time allows."""

    def measure() -> int:
        with device:
            model = GPT(config.model)
        recipe_steps = config.total_steps(len(codes))
        most = None if asked.stretch else recipe_steps
        cost = seconds_per_step(GPTTask(model, config, codes, steps=recipe_steps), range(5))
        return affordable_steps(asked.minutes - asked.tokenizer_minutes, [(1.0, cost)], most)

    codes = CodeSet(folder)
    config = apply_overrides(fit_to_codes(recipe, codes), [f"device={asked.device}", *asked.overrides("gpt")])
    device = pick_device(config.device)
    steps = _steps(asked, plan, "gpt", config, measure)
    if not asked.stretch or any(text.startswith("ema_decay=") for text in asked.overrides("gpt")):
        return dataclasses.replace(config, steps=steps)
    run = asked.out / "gpt"
    begun = (run / "config.json").is_file()
    decay = read_run(run)["config"]["ema_decay"] if begun else short_average(config.ema_decay, steps)
    return dataclasses.replace(config, steps=steps, ema_decay=decay)


def _steps(
    asked: Release,
    plan: dict[str, Any],
    part: str,
    config: TokenizerTrainConfig | GPTTrainConfig,
    measure: Callable[[], int],
) -> int:
    """The planned number; else the one that was set by hand, else the measured one, kept for continuations."""
    if part not in plan["steps"]:
        by_hand = any(text.startswith("steps=") for text in asked.overrides(part))
        plan["steps"][part] = config.steps if by_hand else measure()
        write_json(asked.out / "plan.json", plan)
    steps = int(plan["steps"][part])
    print(f"{part}: recipe {config.recipe}, {steps} steps.", file=sys.stderr, flush=True)
    return steps


def _finish(asked: Release, plan: dict[str, Any], part: str, result: RunResult) -> None:
    """Note the stage as done; a training stopped by Ctrl-C or SIGTERM is not, and stops everything."""
    if result.model is None:
        raise KeyboardInterrupt
    plan["done"][part] = {"steps": result.step, "of": result.steps, "ended": result.reason, **result.values}
    write_json(asked.out / "plan.json", plan)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 and one sentence for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m retinar.train.released", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--data", required=True, help="photographs in any layout of `retinar prepare`, or a folder it prepared")
    add("--out", required=True, type=Path, help="everything goes here; the same command again goes on")
    add("--variant", choices=sorted(VARIANTS), help="default: gpu where there is one, else cpu")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--minutes", type=float, default=25.0, help="for the two trainings together (25)")
    add("--tokenizer", type=Path, help="one that is trained already, in the place of a training")
    add("--perceptual-weights", help="VGG16's weights: safetensors with features.N.*, or torchvision's .pth")
    add("--set", nargs="*", default=[], metavar="PART.KEY=VALUE", help="tokenizer.KEY=VALUE or gpt.KEY=VALUE")
    add("--count", type=int, default=8, help="images of each class in the samples (8)")
    add("--cfg-scale", type=float, default=2.0, help="guidance of the samples (2.0)")
    flags = parser.parse_args(argv)
    try:
        if not flags.data:
            raise InputError("Expected photographs, found no --data: run make model DATA=FOLDER.")
        if not 0 < flags.minutes < math.inf:
            raise InputError(f"Expected --minutes above 0, found {flags.minutes}.")
        variant = flags.variant or ("gpu" if pick_device(flags.device).type == "cuda" else "cpu")
        asked = Release(
            data=Path(flags.data),
            out=flags.out,
            variant=variant,
            device=flags.device,
            minutes=flags.minutes,
            perceptual_weights=flags.perceptual_weights,
            sets=tuple(flags.set),
            count=flags.count,
            cfg_scale=flags.cfg_scale,
            tokenizer=flags.tokenizer,
        )
        print(json.dumps(release(asked), default=str))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
