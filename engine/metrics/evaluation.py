"""Two image folders in, scores per class out: what ``retinar evaluate`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.fid import METRICS, Floor, real_floor
from retinar.engine.metrics.folders import ImageFolder, open_folder, thin
from retinar.engine.metrics.inception import FEATURES, check_mode

ALL = "all"
Classes = dict[str, np.ndarray]
"""Class name -> fp32 [n, 2048] features; the single class ALL where a folder has no subfolders."""


@dataclass(frozen=True)
class Score:
    """Every metric of one class (or of ALL together) in one mode, beside the counts it rests on."""

    label: str
    mode: str
    n_real: int
    n_fake: int
    metrics: dict[str, float]
    floor: dict[str, Floor] = field(default_factory=dict)


@dataclass
class Evaluation:
    """All scores of a pair of folders; ``skipped`` lists unreadable files, ``warnings`` what limits the figures."""

    real: str
    fake: str
    inception: dict[str, object]
    scores: list[Score] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    def score(self, label: str = ALL, mode: str = "clean") -> Score:
        return next(score for score in self.scores if (score.label, score.mode) == (label, mode))


def check_metrics(names: Sequence[str]) -> list[str]:
    """The names, checked against the registry."""
    for name in names:
        if name not in METRICS:
            raise InputError(f"Expected metrics among {', '.join(METRICS)}, found {name!r}: name those.")
    if not names:
        raise InputError(f"Expected at least one metric among {', '.join(METRICS)}, found none: name one.")
    return list(dict.fromkeys(names))


def evaluate_folders(
    real: Path | str,
    fake: Path | str,
    store: FeatureStore,
    *,
    metrics: Sequence[str] = ("fid",),
    modes: Sequence[str] = ("clean",),
    floor: bool = False,
    floor_from: Path | str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score ``fake`` against ``real``, per class where both have class subfolders, and overall.

    Overall means all images of the common classes together. ``floor`` adds the real-against-real figure at the fakes'
    count (see ``real_floor``), with samples from ``floor_from`` where that is given, else from ``real`` itself.
    ``limit`` takes that many images a class, evenly spaced. Raises InputError for missing, empty or unlike folders and
    where fewer than two images of a side can be read.
    """
    names = check_metrics(metrics)
    modes = [check_mode(mode) for mode in dict.fromkeys(modes)]
    folders = {"real": open_folder(real), "fake": open_folder(fake)}
    if floor_from is not None:
        folders["floor"] = open_folder(floor_from)
    result = Evaluation(str(real), str(fake), store.inception.describe())
    result.warnings += [
        f"{folder.root} holds images of its own: its subfolders {', '.join(folder.others)} are not counted"
        for folder in folders.values()
        if folder.others
    ]
    labels = common_classes(folders, result.warnings)
    sides = {side: _files(folder, labels, limit) for side, folder in folders.items()}
    skipped: dict[Path, str] = {}
    for mode in modes:
        read: dict[str, Classes] = {}
        for side, classes in sides.items():
            features = {
                label: store.of_files(files, mode, f"{mode} features of {folders[side].root.name}/{label}")
                for label, files in classes.items()
            }
            skipped.update(pair for found in features.values() for pair in found.skipped)
            read[side] = {label: found.array for label, found in features.items()}
            check_counts(read[side], folders[side].root, skipped)
        result.scores += score_classes(
            read["real"],
            read["fake"],
            metrics=names,
            mode=mode,
            floor=floor or floor_from is not None,
            pool=read.get("floor"),
            pool_name=str(floor_from) if floor_from is not None else str(real),
            seed=seed,
        )
    result.skipped = [{"file": str(path), "reason": reason} for path, reason in sorted(skipped.items())]
    result.warnings += cautions(result, store)
    return result


def common_classes(folders: Mapping[str, ImageFolder], warnings: list[str]) -> list[str]:
    """Class subfolders that all folders share; none (the folders as a whole) where one of them is flat."""
    flat = [str(folder.root) for folder in folders.values() if not folder.classes]
    if flat:
        if len(flat) < len(folders):
            warnings.append(f"{', '.join(flat)} has no class subfolders: everything is scored as a whole")
        return []
    names = [set(folder.classes) for folder in folders.values()]
    common = sorted(set.intersection(*names))
    if not common:
        found = " and ".join("/".join(sorted(each)) for each in names)
        raise InputError(f"Expected class subfolders of the same names, found {found}: rename them, or give one class.")
    if rest := sorted(set.union(*names) - set(common)):
        warnings.append(f"not on every side and left out, overall too: {', '.join(rest)}")
    return common


def _files(folder: ImageFolder, labels: list[str], limit: int | None) -> dict[str, tuple[Path, ...]]:
    classes = {label: folder.classes[label] for label in labels} if labels else {ALL: folder.files}
    return {label: thin(files, limit) for label, files in classes.items()}


def check_counts(classes: Classes, root: Path, skipped: Mapping[Path, str]) -> None:
    for label, rows in classes.items():
        if len(rows) < 2:
            name = root if label == ALL else root / label
            bad = next((f"; {path.name}: {why}" for path, why in skipped.items() if path.is_relative_to(name)), "")
            raise InputError(f"Expected at least 2 readable images in {name}, found {len(rows)}{bad}: add images.")


def score_classes(
    real: Classes,
    fake: Classes,
    *,
    metrics: Sequence[str] = ("fid",),
    mode: str = "clean",
    floor: bool = False,
    pool: Classes | None = None,
    pool_name: str = "",
    seed: int = 0,
) -> list[Score]:
    """Scores of features by class, then of all classes together (the label ALL; last)."""
    groups = [[label] for label in real if label != ALL]
    if len(groups) != 1:
        groups.append(list(real))
    scores = []
    for group in groups:
        reals, fakes = [real[label] for label in group], [fake[label] for label in group]
        pools = [pool[label] for label in group] if pool is not None else None
        values, floors = {}, {}
        for name in metrics:
            values[name] = METRICS[name](np.concatenate(reals), np.concatenate(fakes))
            if floor:
                counts = [len(rows) for rows in fakes]
                floors[name] = real_floor(reals, counts, pools, METRICS[name], seed=seed, source=pool_name)
        counts_of = [sum(len(rows) for rows in side) for side in (reals, fakes)]
        scores.append(Score(group[0] if len(group) == 1 else ALL, mode, counts_of[0], counts_of[1], values, floors))
    return scores


def cautions(result: Evaluation, store: FeatureStore) -> list[str]:
    """What a reader of the figures should know."""
    said = []
    if not store.inception.is_2015:
        said.append("this Inception is not the network of 2015: the figures compare with nothing published")
    few = [f"{score.label} {min(score.n_real, score.n_fake)}" for score in result.scores if _few(score)]
    if few:
        said.append(
            f"fewer than {FEATURES:,} images ({', '.join(dict.fromkeys(few))}): FID is biased upwards and depends on "
            "the count; compare only at equal counts, and with the floor"
        )
    if result.skipped:
        said.append(f"{len(result.skipped)} files could not be read and are left out")
    by_class = {score.label: score for score in result.scores if score.label != ALL}
    if len(by_class) > 1:
        totals = [sum(getattr(score, side) for score in by_class.values()) for side in ("n_real", "n_fake")]
        shares = {name: (score.n_real / totals[0], score.n_fake / totals[1]) for name, score in by_class.items()}
        if max(abs(ours - theirs) for ours, theirs in shares.values()) > 0.05:
            text = ", ".join(f"{name} {ours:.0%} real and {theirs:.0%} fake" for name, (ours, theirs) in shares.items())
            said.append(f"the class shares differ ({text}), which the overall figure includes")
    if any(found.n_sample < score.n_fake for score in result.scores for found in score.floor.values()):
        said.append("there are too few real images for a floor at the fakes' count: its own count stands beside it")
    return said


def _few(score: Score) -> bool:
    return min(score.n_real, score.n_fake) < FEATURES
