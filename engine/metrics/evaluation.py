"""Two image folders in, scores per class out: what ``retinar evaluate`` runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.bootstrap import fits
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.folders import ImageFolder, open_folder, thin
from retinar.engine.metrics.inception import FEATURES, check_mode
from retinar.engine.metrics.scores import ALL, Classes, Score, check_metrics, score_classes
from retinar.engine.metrics.screening import GREY, SIZE, screen


@dataclass
class Evaluation:
    """All scores of a pair of folders; ``skipped`` lists the files left out, ``warnings`` what limits the figures."""

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
    bootstrap: int = 0,
) -> Evaluation:
    """Score ``fake`` against ``real``, per class where both have class subfolders, and overall.

    Overall means all images of the common classes together. ``floor`` adds the real-against-real figure at the fakes'
    count (see ``real_floors``), with samples from ``floor_from`` where that is given, else from ``real`` itself.
    ``limit`` takes that many images a class, evenly spaced. ``bootstrap`` is the number of half samples behind the 95 %
    intervals (200 do; see ``bootstrap``), ``seed`` draws them and the floor's samples. Files that cannot be read and
    images of another kind than their folder's (see ``screen``) are left out and named. Raises InputError for missing,
    empty or unlike folders and where a side keeps fewer than two images (seven for precision, recall, density and
    coverage).
    """
    names = check_metrics(metrics)
    if bootstrap < 0 or bootstrap == 1:
        raise InputError(f"Expected 2 draws or more for intervals, or 0 for none, found {bootstrap}: 200 do.")
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
    skipped: dict[str, dict[Path, str]] = {}
    for mode in modes:
        read: dict[str, Classes] = {}
        for side, classes in sides.items():
            read[side], skipped[side], said = read_side(store, folders[side], classes, mode)
            result.warnings += [] if mode != modes[0] else said
            check_counts(read[side], folders[side].root, skipped[side])
        result.scores += score_classes(
            read["real"],
            read["fake"],
            metrics=names,
            mode=mode,
            floor=floor or floor_from is not None,
            pool=read.get("floor"),
            pool_name=str(floor_from) if floor_from is not None else str(real),
            seed=seed,
            bootstrap=bootstrap,
            progress=store.progress,
        )
    gone = {path: reason for each in skipped.values() for path, reason in each.items()}
    result.skipped = [{"file": str(path), "reason": reason} for path, reason in sorted(gone.items())]
    result.warnings += cautions(result, store, bootstrap, len(skipped["fake"]))
    return result


def read_side(
    store: FeatureStore, folder: ImageFolder, classes: Mapping[str, Sequence[Path]], mode: str
) -> tuple[Classes, dict[Path, str], list[str]]:
    """(features of the images to score by class, file -> reason of those left out, warnings) of one folder."""
    found = {
        label: store.of_files(files, mode, f"{mode} features of {folder.root.name}/{label}")
        for label, files in classes.items()
    }
    looks = {path: look for each in found.values() for path, look in zip(each.files, each.looks, strict=True)}
    screened = screen(looks, folder.root)
    kept = {
        label: each.array[np.array([path not in screened.left_out for path in each.files], bool)]
        for label, each in found.items()
    }
    unread = {path: reason for each in found.values() for path, reason in each.skipped}
    return kept, unread | screened.left_out, screened.warnings


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
    if ALL in common and len(common) > 1:
        raise InputError(f"Expected class subfolders of other names than {ALL}, which stands for the whole: rename it.")
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
            bad = next((f" ({path.name}: {why})" for path, why in skipped.items() if path.is_relative_to(name)), "")
            raise InputError(f"Expected at least 2 readable images in {name}, found {len(rows)}{bad}: add images.")


def cautions(result: Evaluation, store: FeatureStore, bootstrap: int, fakes_left_out: int) -> list[str]:
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
    said += left_out(result.skipped, fakes_left_out)
    by_class = {score.label: score for score in result.scores if score.label != ALL}
    if len(by_class) > 1:
        totals = [sum(getattr(score, side) for score in by_class.values()) for side in ("n_real", "n_fake")]
        shares = {name: (score.n_real / totals[0], score.n_fake / totals[1]) for name, score in by_class.items()}
        if max(abs(ours - theirs) for ours, theirs in shares.values()) > 0.05:
            text = ", ".join(f"{name} {ours:.0%} real and {theirs:.0%} fake" for name, (ours, theirs) in shares.items())
            said.append(f"the class shares differ ({text}), which the overall figure includes")
    if any(found.n_sample < score.n_fake for score in result.scores for found in score.floor.values()):
        said.append("there are too few real images for a floor at the fakes' count: its own count stands beside it")
    if bootstrap:
        for score in result.scores:
            if missing := [name for name in score.metrics if name not in score.intervals]:
                why = "too few images" if fits(score.n_real, score.n_fake) else "too many images for this memory"
                said.append(f"no interval for {', '.join(missing)} of {score.label}: {why}")
    for score in result.scores:
        if score.floor and (missing := [name for name in score.metrics if name not in score.floor]):
            said.append(f"no floor for {', '.join(missing)} of {score.label}: too few real images")
    return list(dict.fromkeys(said))


def left_out(skipped: Sequence[Mapping[str, str]], fakes: int) -> Iterator[str]:
    """How many files are left out, by kind."""
    grey = sum(each["reason"] == GREY for each in skipped)
    sizes = sum(each["reason"].startswith(SIZE) for each in skipped)
    kinds = {"could not be read": len(skipped) - grey - sizes, "greyscale": grey, "of a wrong size": sizes}
    if skipped:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        yield f"{len(skipped)} of the files are left out: {listed}"
    if fakes:
        yield f"{fakes} of the scored images are left out: where a generator made them, that flatters it"


def _few(score: Score) -> bool:
    return min(score.n_real, score.n_fake) < FEATURES
