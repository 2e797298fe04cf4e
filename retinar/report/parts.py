"""What ``retinar evaluate`` measures beside the scores: which parts the given folders allow, and their measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retinar.engine.errors import InputError
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.folders import open_folder
from retinar.engine.perceptual import GIVE_IT, LPIPS, find_vgg16
from retinar.engine.progress import Progress

PARTS = ("diversity", "memorisation", "usefulness")
NEEDS_TRAIN = "give the training photographs with --train DIR"


@dataclass(frozen=True)
class Classifiers:
    """The part of the command line that is about usefulness; None leaves a choice to the device."""

    seeds: int = 3
    network: str | None = None
    steps: int | None = None
    weights: Path | None = None
    positive: str | None = None


@dataclass(frozen=True)
class Folders:
    """What there is to measure with."""

    real: Path
    fake: Path | None = None
    train: Path | None = None
    valid: Path | None = None


@dataclass
class Plan:
    """The parts to measure. ``asked`` are those named by the person: their errors are told, others become warnings."""

    parts: list[str]
    asked: bool
    lpips: LPIPS | None = None
    warnings: list[str] = field(default_factory=list)


def plan_parts(
    named: str | None, folders: Folders, *, report: bool, vgg: Path | None, device: torch.device, seeds: int = 1
) -> Plan:
    """The parts named (separated by commas; "none" for none), or with a report all that ``folders`` allow.

    LPIPS is loaded where its weights are found and anything may use it. Raises InputError for an unknown part, and for
    a named one that lacks a folder or weights.
    """
    names = [name.strip() for name in named.split(",") if name.strip()] if named is not None else []
    names = [] if names == ["none"] else list(dict.fromkeys(names))
    for name in names:
        if name not in PARTS:
            raise InputError(f"Expected parts among {', '.join(PARTS)}, or none, found {name!r}: name those.")
    plan = Plan(names, named is not None)
    if named is None and not report:
        plan.lpips = _lpips(vgg, device) if vgg is not None else None
        return plan
    if report or vgg is not None or {"diversity", "memorisation"} & set(names):
        plan.lpips = _find_lpips(vgg, device, plan.warnings)
    lacking = {name: why for name in PARTS if (why := _lacks(name, folders, plan.lpips))}
    if plan.asked:
        for name in names:
            if name in lacking:
                raise InputError(f"Expected what {name} needs, found less: {lacking[name]}.")
    else:
        plan.parts = [name for name in PARTS if name not in lacking]
        plan.warnings += [f"{name} was left out: {why}" for name, why in lacking.items() if folders.fake is not None]
    if "usefulness" in plan.parts and seeds < 1:
        raise InputError(f"Expected --seeds of at least 1, found {seeds}: 3 do.")
    return plan


def check_classifiers(plan: Plan, folders: Folders, wanted: Classifiers, device: torch.device) -> None:
    """Raise InputError, before anything is measured, for classifiers that were asked for and cannot be trained."""
    if "usefulness" not in plan.parts or folders.train is None:
        return
    from retinar.engine.metrics.networks import build_network, plan_recipe

    recipe = plan_recipe(device, network=wanted.network, steps=wanted.steps, weights=wanted.weights)
    if wanted.network is not None or wanted.weights is not None:
        build_network(recipe, 2)
    labels = sorted(open_folder(folders.train).classes)
    if wanted.positive is not None and wanted.positive not in labels:
        raise InputError(
            f"Expected --positive among the classes {', '.join(labels)}, found {wanted.positive!r}: choose one."
        )


def _lacks(name: str, folders: Folders, lpips: LPIPS | None) -> str:
    """What a part still needs; empty where nothing."""
    if folders.fake is None:
        return "give the folder of generated images"
    if name == "diversity":
        return "" if lpips is not None else f"LPIPS has no weights, {GIVE_IT}"
    if folders.train is None:
        return NEEDS_TRAIN
    if name == "usefulness":
        sides = [open_folder(folder) for folder in (folders.real, folders.fake, folders.train)]
        common = set.intersection(*(set(side.classes) for side in sides))
        if len(common) < 2:
            return f"{', '.join(str(side.root) for side in sides)} need two class subfolders of the same names"
    return ""


def _find_lpips(vgg: Path | None, device: torch.device, warnings: list[str]) -> LPIPS | None:
    """LPIPS; a warning where its weights or its package are missing and nobody named them."""
    try:
        weights = find_vgg16(vgg)
        if weights is not None:
            return _lpips(weights, device)
        warnings.append(f"LPIPS was left out: its weights were not found, {GIVE_IT}")
    except InputError as error:
        if vgg is not None:
            raise
        warnings.append(f"LPIPS was left out: {error}")
    return None


def _lpips(weights: Path, device: torch.device) -> LPIPS:
    return LPIPS(weights).to(device)


def measure_parts(
    plan: Plan,
    folders: Folders,
    store: FeatureStore,
    *,
    classifiers: Classifiers,
    device: torch.device,
    limit: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """The dictionaries of the planned parts by name. An InputError of a part that nobody named becomes a warning, so
    that what was measured before is not lost."""
    assert folders.fake is not None or not plan.parts
    found: dict[str, Any] = {}

    def diversity() -> Mapping[str, Any]:
        from retinar.engine.metrics.diversity import diversity as measure

        assert plan.lpips is not None and folders.fake is not None
        return {
            side: [row.to_dict() for row in measure(folder, plan.lpips, limit=limit, seed=seed, progress=progress)]
            for side, folder in (("real", folders.real), ("fake", folders.fake))
        }

    def memorisation() -> Mapping[str, Any]:
        from retinar.engine.metrics.memorisation import find_memorised

        assert folders.train is not None and folders.fake is not None
        return find_memorised(
            folders.train, folders.fake, folders.real, store, plan.lpips, limit=limit, seed=seed, progress=progress
        ).to_dict()

    def usefulness() -> Mapping[str, Any]:
        from retinar.engine.metrics.usefulness import measure_usefulness

        assert folders.train is not None
        return measure_usefulness(
            folders.train,
            folders.real,
            folders.fake,
            real_valid=folders.valid,
            seeds=classifiers.seeds,
            network=classifiers.network,
            steps=classifiers.steps,
            weights=classifiers.weights,
            positive=classifiers.positive,
            limit=limit,
            seed=seed,
            device=device,
            progress=progress,
        ).to_dict()

    measures: dict[str, Callable[[], Mapping[str, Any]]] = {
        "diversity": diversity,
        "memorisation": memorisation,
        "usefulness": usefulness,
    }
    for name in plan.parts:
        try:
            found[name] = measures[name]()
        except InputError as error:
            if plan.asked:
                raise
            plan.warnings.append(f"{name} was left out: {error}")
    return found
