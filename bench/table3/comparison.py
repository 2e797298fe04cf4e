"""Both methods trained for the same wall-clock time on the same device, sampled, and scored: the paper's Table 3.

Stages, each taken up where it stopped when the same command is given again::

    OUT/prepared/                photographs (unless --data already is a prepared folder)
    OUT/autoregressive/RECIPE/   the runs of our method: tokenizer, codes, transformer
    OUT/iddpm/RECIPE/            the runs of the baseline, one for each recipe
    OUT/tuning/                  images for choosing among recipes and sampling settings, scored on the valid split
    OUT/samples/METHOD/          as many images of each class as the test split has
    OUT/table3.json  README.md  figure2.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from retinar import __version__
from retinar.bench import machine, record
from retinar.bench.table3 import page
from retinar.bench.table3.methods import Job, Method, Setting, methods
from retinar.bench.table3.plan import Plan
from retinar.engine.checkpoint import digest
from retinar.engine.device import find_device
from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file, write_json
from retinar.engine.metrics.evaluation import ALL, evaluate_folders
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.folders import open_folder
from retinar.engine.metrics.inception import load_inception
from retinar.engine.metrics.manifold import LEAST
from retinar.engine.perceptual import find_vgg16
from retinar.engine.philox import stream
from retinar.engine.progress import Progress, plain
from retinar.train.data.images import ImageSet
from retinar.train.data.manifest import MANIFEST
from retinar.train.data.prepare import prepare
from retinar.train.loop import say

METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
SPLITS = ("train", "valid", "test")
PHOTOGRAPHS = ("photographs", "manifest")


@dataclass(frozen=True)
class Comparison:
    """What is asked for.

    ``budget``: minutes of training for our method, and for every recipe of the baseline. ``autoregressive``,
    ``iddpm``: trained checkpoints, used as they are in the place of a training; ``tokenizer``: a trained one: the whole
    budget is the transformer's then. ``tune``: images a class for each setting tried on the valid split; 0 takes each
    method's first recipe and setting. ``count``: images a class of the samples; None: as many as the test split has.
    ``sets``: ``tokenizer.KEY=VALUE``, ``gpt.KEY=VALUE`` and ``iddpm.KEY=VALUE``.
    """

    data: Path
    out: Path
    budget: float = 60.0
    size: int | None = None
    device: str | None = None
    autoregressive: Path | None = None
    iddpm: Path | None = None
    tokenizer: Path | None = None
    recipes: tuple[str, ...] = ()
    tune: int = 24
    count: int | None = None
    vgg: Path | None = None
    inception: Path | None = None
    bootstrap: int = 200
    seed: int = 0
    sets: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what cannot be, before anything long. Raises InputError."""
        for name, least in (("tune", 0), ("bootstrap", 0)):
            if getattr(self, name) < least:
                raise InputError(f"Expected --{name} of at least {least}, found {getattr(self, name)}.")
        if self.tune == 1:
            raise InputError("Expected at least 2 images a class to tune with, found 1: ask for more, or for none.")
        if self.count is not None and self.count < 7:
            raise InputError(f"Expected --count of at least 7 images a class to score, found {self.count}.")
        if not 0 < self.budget < math.inf:
            raise InputError(f"Expected --budget above 0 minutes, found {self.budget}.")
        if not self.data.is_dir():
            raise InputError(f"Expected a folder of photographs for --data, found none at {str(self.data)!r}.")
        raw = not (self.data / MANIFEST).is_file()
        if raw and self.data.resolve() in (self.out.resolve(), *self.out.resolve().parents):
            raise InputError(f"Expected --out apart from the photographs in {self.data}, found {self.out}.")
        stream(self.seed, 0)  # InputError out of range
        for text in self.sets:
            if text.partition(".")[0] not in ("tokenizer", "gpt", "iddpm") or "=" not in text:
                raise InputError(
                    f"Expected --set tokenizer.KEY=VALUE, gpt.KEY=VALUE or iddpm.KEY=VALUE, found {text!r}."
                )
        for path in (self.autoregressive, self.iddpm, self.tokenizer):
            if path is not None and not path.exists():
                raise InputError(f"Expected a checkpoint at {path}, found none: check the path.")

    def fixed(self) -> dict[str, Any]:
        """What a continuation must share."""
        keys = ("budget", "size", "autoregressive", "iddpm", "tokenizer", "recipes", "tune", "count", "seed", "sets")
        return {key: json.loads(json.dumps(getattr(self, key), default=str)) for key in keys}


def compare(asked: Comparison, progress: Progress = plain) -> dict[str, Any]:
    """All stages -> the content of OUT/table3.json. InputError as the stages raise it; KeyboardInterrupt when Ctrl-C
    stopped a training (it has saved itself)."""
    asked.check()
    device = find_device(asked.device)
    store = FeatureStore(load_inception(asked.inception, device), progress=progress)
    vgg = find_vgg16(asked.vgg)
    notes = _without_vgg(asked) if vgg is None else {}
    for note in notes.values():
        say(note)
    job = Job(
        out=asked.out,
        device=str(device),
        budget=asked.budget,
        sets=(*asked.sets, *notes),
        vgg=vgg,
        seed=asked.seed,
        progress=progress,
    )
    both: tuple[Method, Method] = methods(
        asked.autoregressive, asked.tokenizer, asked.iddpm, asked.recipes, job, asked.size
    )
    plan = Plan.open(asked.out, {**asked.fixed(), "device": str(device), "checkpoints": _digests(asked)})
    prepared = _prepared(asked, both[0].image_size(job), progress)
    _same_photographs(plan, prepared)
    job.data = prepared
    counts = {label: len(files) for label, files in open_folder(prepared / "test").classes.items()}
    if not counts:
        raise InputError(f"Expected class subfolders in {prepared / 'test'}, found none: prepare the photographs.")
    for label, most in counts.items():
        if most < LEAST:
            raise InputError(
                f"Expected at least {LEAST} photographs of {label} to score with in {prepared / 'test'}, found {most}: "
                "add photographs."
            )
    if any(not set(method.recipes) <= {"given"} for method in both):
        ImageSet(prepared, "train", size=both[0].image_size(job))  # InputError for photographs of another size
    for method in both:
        method.check(counts)
    if asked.count is not None:
        counts = {label: min(asked.count, most) for label, most in counts.items()}

    sides = [_side(asked, method, job, plan, counts, store) for method in both]
    sides[0]["warnings"] += notes.values()
    content = {
        "format": 1,
        "what": "table3",
        "version": __version__,
        "device": machine.device_name(device.type),
        "kind": device.type,
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "commit": machine.commit(),
        "date": record.now(),
        "command": record.command(),
        "budget_minutes": asked.budget,
        "inception": store.inception.describe(),
        "counts": counts,
        "sides": sides,
        "settings": {key: value for key, value in asdict(asked).items() if key not in ("data", "out")},
    }
    content = json.loads(json.dumps(content, default=str))
    write_json(asked.out / "table3.json", content)
    figure = page.figure(asked.out / "figure2.png", _pictures(sides, asked.out))
    (asked.out / "README.md").write_text(page.document(content, figure.name), encoding="utf-8")
    return content


def _side(
    asked: Comparison, method: Method, job: Job, plan: Plan, counts: Mapping[str, int], store: FeatureStore
) -> dict[str, Any]:
    """One method: trained, tuned on valid, sampled, scored on test."""
    trained = {}
    for recipe in method.recipes:
        if (method.key, recipe) not in plan:
            spent = plan.seconds(f"train {method.key} {recipe}")
            with plan.timed(f"train {method.key} {recipe}"):
                found = method.train(job, recipe, asked.budget - spent / 60)
            if "minutes" not in found:  # a given checkpoint has its own
                found["minutes"] = round(plan.seconds(f"train {method.key} {recipe}") / 60, 2)
            # The command may be given again from another folder.
            plan.keep((method.key, recipe), {**found, "model": Path(found["model"]).resolve()})
        trained[recipe] = plan[method.key, recipe]
    chosen, tuning = _tuned(asked, method, job, plan, trained, store)
    model, setting = Path(trained[chosen["recipe"]]["model"]), chosen["setting"]
    folder = asked.out / "samples" / method.key
    say(f"{method.title}: {chosen['recipe']}, {setting}; {sum(counts.values())} images.")
    if ("sampled", method.key) not in plan:
        with plan.timed(f"sample {method.key}"):
            method.sample(job, model, setting, counts, folder)
        plan.keep(("sampled", method.key), {"images": sum(counts.values())})
    result = evaluate_folders(
        job.data / "test",
        folder,
        store,
        metrics=METRICS,
        floor_from=job.data / "train",
        bootstrap=asked.bootstrap,
        seed=asked.seed,
    )
    return {
        "method": method.key,
        "title": method.title,
        "recipe": chosen["recipe"],
        "setting": setting,
        "trained": trained,
        "tuning": tuning,
        "samples": str(folder.relative_to(asked.out)),
        "seconds_per_image": plan.seconds(f"sample {method.key}") / sum(counts.values()),
        "scores": [asdict(score) for score in result.scores],
        "warnings": result.warnings,
    }


def _tuned(
    asked: Comparison,
    method: Method,
    job: Job,
    plan: Plan,
    trained: Mapping[str, Mapping[str, Any]],
    store: FeatureStore,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipe and setting of the lowest mean FID over the classes against the valid split, and all that were
    tried."""
    tries: list[dict[str, Any]] = [
        {"recipe": recipe, "setting": dict(setting)} for recipe in method.recipes for setting in method.settings(job)
    ]
    if asked.tune == 0 or len(tries) == 1:
        return tries[0], []
    counts = dict.fromkeys(open_folder(job.data / "valid").classes, asked.tune)
    for each in tries:
        name = f"{method.key}/{each['recipe']}/{slug(each['setting'])}"
        key = ("tuning", name)
        if key not in plan:
            folder = asked.out / "tuning" / name
            method.sample(job, Path(trained[each["recipe"]]["model"]), each["setting"], counts, folder)
            found = evaluate_folders(job.data / "valid", folder, store, metrics=("fid",), seed=asked.seed)
            by_class = {score.label: score.metrics["fid"] for score in found.scores if score.label != ALL}
            plan.keep(key, {"fid": by_class, "mean_fid": sum(by_class.values()) / len(by_class), "images": asked.tune})
        each |= plan[key]
        say(f"{method.title}, {each['recipe']}, {each['setting']}: FID {each['mean_fid']:.1f} on valid.")
    best = min(tries, key=lambda each: float(each["mean_fid"]))
    return best, tries


def slug(setting: Setting) -> str:
    """A setting as a folder's name."""
    return "-".join(f"{key}={value}" for key, value in setting.items()) or "default"


def _prepared(asked: Comparison, size: int, progress: Progress) -> Path:
    folder = asked.data
    if not (folder / MANIFEST).is_file():
        folder = asked.out / "prepared"
        prepare(asked.data, folder, size=size, progress=progress)
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise InputError(f"Expected the splits {', '.join(SPLITS)} in {folder}, found no {split}.")
    return folder


def _without_vgg(asked: Comparison) -> dict[str, str]:
    """Change to the tokenizer's recipe -> why, where its training wants VGG16's weights and there are none."""
    trained = asked.autoregressive is None and asked.tokenizer is None
    if not trained or any(text.startswith("tokenizer.perceptual=") for text in asked.sets):
        return {}
    why = "no VGG16 weights found: the tokenizer is trained without the perceptual loss (--vgg FILE gives them)"
    return {"tokenizer.perceptual=none": why}


def _digests(asked: Comparison) -> dict[str, list[str]]:
    """The weights of the checkpoints that were given."""
    named = {key: getattr(asked, key) for key in ("autoregressive", "iddpm", "tokenizer")}
    return {
        key: [digest(part) for part in (path, path / "tokenizer") if part == path or part.is_dir()]
        for key, path in named.items()
        if path is not None
    }


def _same_photographs(plan: Plan, prepared: Path) -> None:
    """InputError where the comparison was begun with other photographs."""
    found = sha256_file(prepared / MANIFEST)
    if PHOTOGRAPHS not in plan:
        plan.keep(PHOTOGRAPHS, {"sha256": found})
    if plan[PHOTOGRAPHS]["sha256"] != found:
        raise InputError(
            f"Expected the photographs that the comparison was begun with, found others in {prepared}: give the same "
            "--data to go on, or choose another --out."
        )


def _pictures(sides: Sequence[Mapping[str, Any]], out: Path) -> list[tuple[str, int, list[Path]]]:
    """(heading, how many there are, files) of every method and class."""
    groups = []
    for side in sides:
        for label, files in open_folder(out / side["samples"]).classes.items():
            groups.append((f"{side['title']}, {label}", len(files), list(files)))
    return groups
