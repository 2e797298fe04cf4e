"""The whole path in miniature: photographs, tokenizer, codes, transformer, samples, scores; every stage resumes.

Everything is done by the functions behind the verbs of the same names, with recipes of the smallest size, so that a
person sees in minutes what `retinar prepare`, `train`, `encode`, `generate` and `evaluate` do with real photographs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retinar import __version__
from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file, write_json
from retinar.engine.progress import Progress, plain

if TYPE_CHECKING:
    import numpy as np

    from retinar.engine.sampler import Sampler

PLAN, METRICS = "demo.json", "metrics.json"
MINUTES = 5.0
AGREEMENT = 0.8
"""The share of generated images that the probe must label as asked."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a demo; the defaults take under five minutes on two cores."""

    data: str | None = None
    """Photographs to use; None: phantoms are drawn."""
    size: int = 48
    """Pixels on a side."""
    phantoms: tuple[int, int, int] = (160, 16, 48)
    """Phantoms a class for train, valid and test."""
    images: int = 48
    """Generated images a class."""
    cfg_scale: float = 3.0
    temperature: float = 0.7
    """Below 1, for so short a training leaves much of the probability on codes that break a picture."""
    top_p: float = 0.95
    seed: int = 0
    minutes: float = MINUTES
    """The trainings take so many times more or fewer steps than in the default."""
    tokenizer: tuple[str, ...] = ()
    """Changes to the recipe vq4-tiny, key=value."""
    gpt: tuple[str, ...] = ()
    """Changes to the recipe fundus-tiny, key=value."""


class Folders(NamedTuple):
    """Where a demo keeps what it makes."""

    out: Path
    photographs: Path
    prepared: Path
    tokenizer: Path
    codes: Path
    gpt: Path
    samples: Path


def folders(out: Path | str) -> Folders:
    """The folders of a demo in ``out``, named as they are called here."""
    return Folders(Path(out), *(Path(out) / name for name in Folders._fields[1:]))


def demo(plan: Plan, out: Path | str, *, progress: Progress = plain) -> dict[str, Any]:
    """Run what is missing of the demo in ``out``; returns its figures, with "passed" for the claims it makes.

    The same plan gives the same figures on one machine. InputError for a folder that holds another demo.
    """
    began = time.monotonic()
    at = folders(out)
    claim(plan, at)
    tell = Teller(7)

    if plan.data is None:
        tell(f"drawing {2 * sum(plan.phantoms)} fundus phantoms, healthy and npdr, in OIA-DDR's layout")
        source = draw(plan, at.photographs, progress)
    else:
        tell(f"reading the photographs in {plan.data}")
        source = Path(plan.data)
    tell(f"preparing: the centred square of each, {plan.size} pixels, sorted by split and class")
    prepare(plan, source, at.prepared, progress)
    tell("training a tiny tokenizer: photographs to a grid of codes and back")
    train_tokenizer(plan, at, progress)
    tell("encoding the photographs and their mirror images")
    encode(at, progress)
    tell("training a tiny transformer to continue a grid of codes, class by class")
    train_gpt(plan, at, progress)
    tell(f"sampling and decoding {plan.images} images of each class, guidance {plan.cfg_scale:g}")
    sampler = generate(plan, at, progress)
    tell("scoring: FID against held-out photographs, and a classifier that has only seen real ones")
    scored = [sha256_file(folder / "manifest.jsonl") for folder in (at.prepared, at.samples)]
    figures = earlier(at, scored)
    if figures is None:
        figures = {**score(plan, at, sampler, progress), "scored": scored, "plan": asdict(plan), "retinar": __version__}
        write_json(at.out / METRICS, figures)
    return {
        "passed": figures["passed"],
        "fid": figures["fid"],
        "probe": figures["probe"],
        "sheet": at.samples / "sheet.png",
        "metrics": at.out / METRICS,
        "tokenizer": at.tokenizer / "model",
        "transformer": at.gpt / "model",
        "seconds": round(time.monotonic() - began, 1),
    }


class Teller:
    """One plain line on stderr at the start of every stage."""

    def __init__(self, stages: int) -> None:
        self.stages, self.stage = stages, 0

    def __call__(self, what: str) -> None:
        self.stage += 1
        print(f"[{self.stage}/{self.stages}] {what}", file=sys.stderr, flush=True)


def claim(plan: Plan, at: Folders) -> None:
    """Make the folder this demo's own, or see that it already is; InputError when it is another's."""
    ours = json.loads(json.dumps({"format": 1, "plan": asdict(plan)}))
    path = at.out / PLAN
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != ours:
            raise InputError(
                f"Expected a demo with the same settings in {at.out}, found another: choose another --out or remove it."
            )
        return
    if at.out.is_dir() and any(at.out.iterdir()):
        raise InputError(f"Expected an empty folder or an earlier demo at {at.out}, found other files: choose --out.")
    at.out.mkdir(parents=True, exist_ok=True)
    write_json(path, ours)


def draw(plan: Plan, folder: Path, progress: Progress) -> Path:
    """The phantoms, in OIA-DDR's layout."""
    from retinar.train.data.phantoms import write_phantoms

    counts = {
        split: {"healthy": count, "npdr": count}
        for split, count in zip(("train", "valid", "test"), plan.phantoms, strict=True)
    }
    write_phantoms(folder, counts, seed=plan.seed, size=2 * plan.size, progress=progress)
    return folder


def prepare(plan: Plan, source: Path, folder: Path, progress: Progress) -> None:
    """`retinar prepare`."""
    from retinar.train.data.prepare import prepare as prepare_folder

    few = plan.data is None  # phantoms are so few and small that starting processes would take longer than the work
    prepare_folder(source, folder, size=plan.size, workers=1 if few else None, progress=progress)


def train_tokenizer(plan: Plan, at: Folders, progress: Progress) -> None:
    """`retinar train tokenizer --recipe vq4-tiny`."""
    from retinar.train import recipes
    from retinar.train.config import apply_overrides
    from retinar.train.tokenizer import train_tokenizer as train

    if (at.tokenizer / "model" / "config.json").is_file():
        return
    config = recipes.tokenizer_recipe("vq4-tiny")
    length = (f"steps={scaled(plan, config.steps)}", f"quantize_from={scaled(plan, config.quantize_from)}")
    config = apply_overrides(config, (f"model.image_size={plan.size}", f"seed={plan.seed}", *length, *plan.tokenizer))
    result = train(config, at.prepared, at.tokenizer, resume=at.tokenizer.exists(), progress=progress)
    stop_if(result.reason)


def encode(at: Folders, progress: Progress) -> None:
    """`retinar encode`, train and valid."""
    from retinar.train.codes import encode_folder

    for split in ("train", "valid"):
        encode_folder(at.prepared, at.tokenizer / "model", at.codes / split, split=split, progress=progress)


def train_gpt(plan: Plan, at: Folders, progress: Progress) -> None:
    """`retinar train gpt --recipe fundus-tiny`."""
    from retinar.train import recipes
    from retinar.train.code_fit import fit_to_codes
    from retinar.train.codes import CodeSet
    from retinar.train.config import apply_overrides
    from retinar.train.gpt import train_gpt as train

    if (at.gpt / "model" / "config.json").is_file():
        return
    config = fit_to_codes(recipes.gpt_recipe("fundus-tiny"), CodeSet(at.codes / "train"))
    config = apply_overrides(config, (f"steps={scaled(plan, config.steps)}", f"seed={plan.seed}", *plan.gpt))
    result = train(
        config,
        at.codes / "train",
        at.gpt,
        valid=at.codes / "valid",
        tokenizer=at.tokenizer / "model",
        resume=at.gpt.exists(),
        progress=progress,
    )
    stop_if(result.reason)


def scaled(plan: Plan, steps: int | None) -> int:
    """A recipe's number of steps for the time that the plan allows."""
    return max(1, round((steps or 0) * plan.minutes / MINUTES))


def stop_if(reason: str) -> None:
    """A training that Ctrl-C stopped has saved itself; the demo stops there too."""
    if reason == "interrupted":
        raise KeyboardInterrupt


def generate(plan: Plan, at: Folders, progress: Progress) -> Sampler:
    """`retinar generate`, every class."""
    from retinar.engine.generate import generate_folder
    from retinar.engine.sampler import Sampler

    sampler = Sampler.from_pretrained(at.gpt / "model")
    generate_folder(
        sampler,
        at.samples,
        [(name, plan.images) for name in sampler.classes],
        seed=plan.seed,
        cfg_scale=plan.cfg_scale,
        temperature=plan.temperature,
        top_p=plan.top_p,
        max_images=32,
        model=at.gpt / "model",
        progress=progress,
    )
    return sampler


def random_images(plan: Plan, sampler: Sampler) -> list[np.ndarray]:
    """Codes drawn evenly from the codebook, decoded: what the images would be had the transformer learned nothing."""
    import torch

    noise = torch.Generator().manual_seed(plan.seed)
    codes = torch.randint(sampler.config.vocab_size, (plan.images, sampler.config.block_size), generator=noise)
    return [sampler.decode(row) for row in codes]


def earlier(at: Folders, scored: list[str]) -> dict[str, Any] | None:
    """The figures of an earlier run where they are of the very same photographs and images (digests ``scored``)."""
    try:
        found = json.loads((at.out / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("scored") == scored else None


def score(plan: Plan, at: Folders, sampler: Sampler, progress: Progress) -> dict[str, Any]:
    """FID of every class and of random codes against held-out photographs, and the probe's agreement."""
    from retinar.engine.metrics.features import FeatureStore
    from retinar.engine.metrics.fid import frechet_distance
    from retinar.engine.metrics.folders import open_folder, thin
    from retinar.engine.metrics.inception import load_inception

    real = open_folder(at.prepared / "test").classes
    fake = open_folder(at.samples).classes
    store = FeatureStore(load_inception(), progress=progress)
    with progress("features of random codes", None):
        random_features = store.of_arrays(random_images(plan, sampler))
    fid: dict[str, dict[str, float | int]] = {}
    for label in sampler.classes:
        held_out = store.of_files(thin(real[label], 4 * plan.images), label=f"features of real {label}").array
        made = store.of_files(fake[label], label=f"features of generated {label}").array
        fid[label] = {
            "generated": round(frechet_distance(held_out, made), 2),
            "random_codes": round(frechet_distance(held_out, random_features), 2),
            "n_real": len(held_out),
            "n_generated": len(made),
            "n_random": len(random_features),
        }
    agreement = probe(plan, at, sampler.classes, fake, progress)
    passed = {
        f"FID of generated {label} below that of random codes": row["generated"] < row["random_codes"]
        for label, row in fid.items()
    }
    passed[f"probe labels at least {AGREEMENT:.0%} as asked"] = agreement["generated"] >= AGREEMENT
    return {"fid": fid, "probe": agreement, "passed": passed}


def probe(
    plan: Plan, at: Folders, classes: Sequence[str], fake: Mapping[str, Sequence[Path]], progress: Progress
) -> dict[str, float]:
    """A small classifier trained on real photographs: the shares of held-out and of generated ones it labels right."""
    import numpy as np

    from retinar.engine.metrics.folders import read_image
    from retinar.engine.metrics.probe import train_probe
    from retinar.train.data.images import ImageSet

    sets = {split: ImageSet(at.prepared, split, classes=classes) for split in ("train", "test")}
    pixels = {split: found.load_batch(range(len(found))) for split, found in sets.items()}
    judge = train_probe(pixels["train"], sets["train"].labels, size=plan.size, seed=plan.seed, progress=progress)
    made = {label: np.stack([read_image(path) for path in fake[label]]) for label in classes}
    by_class = {
        label: judge.accuracy(images, np.full(len(images), number))
        for number, (label, images) in enumerate(made.items())
    }
    asked = sum(by_class[label] * len(made[label]) for label in classes) / sum(map(len, made.values()))
    return {
        "generated": round(asked, 4),
        **{f"generated {label}": round(share, 4) for label, share in by_class.items()},
        "held_out_real": round(judge.accuracy(pixels["test"], sets["test"].labels), 4),
    }
