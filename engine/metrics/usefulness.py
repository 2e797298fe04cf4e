"""What generated images are worth to a classifier: trained on real, synthetic or both, tested on real photographs.

All three are trained with equally many steps on batches of equal size, so that more images are no more training. Which
state of a training is kept, and where its threshold lies, is decided on ``real_valid``, never on the test photographs;
that holds for the classifier of synthetic images too, which thus sees real photographs to choose by, not to learn from.
The source is in the spirit of the classification accuracy score (Ravuri and Vinyals, 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from retinar.engine.device import find_device
from retinar.engine.errors import InputError
from retinar.engine.metrics.classifier import train_classifier
from retinar.engine.metrics.discrimination import Figure, draw_samples, wilson
from retinar.engine.metrics.folders import open_folder, thin
from retinar.engine.metrics.judgement import (
    Examination,
    Row,
    choose_thresholds,
    decide,
    figure_to_choose_by,
    judge,
)
from retinar.engine.metrics.networks import Recipe, plan_recipe
from retinar.engine.metrics.pictures import Pictures, check_apart, check_read, common_labels, join, read_pictures
from retinar.engine.metrics.sources import Origin, read_origins, source_scores, tie, tie_warning
from retinar.engine.progress import Progress, silent

REAL, SYNTHETIC, BOTH = "real", "synthetic", "both"
TRAIN, TEST, FAKE, VALID = "training", "test", "generated", "validation"
JUDGING = "judging"  # what decides a threshold: validation photographs, else the row's own training images
DRAWS = 1000
"""Of the bootstrap."""
FEW = 20
"""Test photographs of a class below which the figures are called weak."""


@dataclass(frozen=True)
class Difference:
    """AUROC of one row less that of another on the same test photographs; the interval pairs the draws."""

    row: str
    less: str
    auroc: Figure


@dataclass(frozen=True)
class Agreement:
    """The share of images of a class that the real-trained classifiers give their label; Wilson's interval (95 %).

    The classifiers of all seeds decide together: an image has one vote, by the mean of their log odds.
    """

    label: str
    images: int
    agreement: float
    interval: tuple[float, float]


@dataclass
class Usefulness:
    """Everything measured; ``to_dict`` are plain values for JSON."""

    network: str
    size: int
    seeds: int
    steps: int
    batch_size: int
    lr: float
    bfloat16: bool
    weights: str | None
    device: str
    labels: list[str]
    positive: str
    chosen_on: str | None
    resampled: str
    draws: int
    rows: list[Row] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    class_fidelity: list[Agreement] = field(default_factory=list)
    real_agreement: list[Agreement] = field(default_factory=list)
    sources: dict[str, object] | None = None
    skipped: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    def row(self, trained_on: str) -> Row:
        return next(row for row in self.rows if row.trained_on == trained_on)


def measure_usefulness(
    real_train: Path | str,
    real_test: Path | str,
    fake: Path | str | None,
    *,
    real_valid: Path | str | None = None,
    seeds: int = 3,
    network: str | None = None,
    size: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    bfloat16: bool | None = None,
    weights: Path | str | None = None,
    positive: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress = silent,
) -> Usefulness:
    """Train classifiers on ``real_train``, on ``fake`` and on both; test them on ``real_test``.

    Folders have a subfolder for each class, two or more, of the same names; ``fake`` None leaves the row ``real``.
    ``real_valid`` chooses states and thresholds; without it the last state counts, and training images choose.
    Classifiers of ``seeds`` seeds (from ``seed`` on) are trained for ``steps`` steps of ``batch_size`` images of
    ``size`` px; what is None comes from ``networks.PLANS``. ``weights`` is a torchvision state dict of
    ``network``. ``positive`` names the class that sensitivity speaks of: the last by name (npdr) where None. ``limit``
    takes that many images a class, evenly spaced. Raises InputError for folders without common classes, a class that
    is missing somewhere, test photographs among the others, and what ``build_network`` refuses.
    """
    device = find_device(device)
    if seeds < 1:
        raise InputError(f"Expected at least 1 seed, found {seeds}: ask for some.")
    recipe = plan_recipe(
        device,
        network=network,
        size=size,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        bfloat16=bfloat16,
        weights=weights,
    )
    warned: list[str] = []
    given = {TRAIN: real_train, TEST: real_test, FAKE: fake, VALID: real_valid}
    folders = {side: open_folder(path) for side, path in given.items() if path is not None}
    labels = common_labels(folders, warned)
    if positive is not None and positive not in labels:
        raise InputError(f"Expected the positive class among {', '.join(labels)}, found {positive!r}: choose one.")
    pictures: dict[str, Pictures] = {}
    for side, folder in folders.items():
        files = [thin(folder.classes[label], limit) for label in labels]
        pictures[side] = read_pictures(files, recipe.size, folder.root, progress)
        check_read(pictures[side], labels, folder.root)
    check_apart(pictures)
    real = [side for side in pictures if side != FAKE]
    every = iter(read_origins([path for side in real for path in pictures[side].files], labels))
    origins = {side: [next(every) for _ in pictures[side].files] for side in real}
    patients = [origin.patient for origin in origins[TEST]]
    exam = Examination(
        labels,
        pictures[TEST].classes_N,
        [origin.source for origin in origins[TEST]],
        draw_samples(patients, seeds, DRAWS, seed),
        labels.index(positive or labels[-1]),
    )
    result = Usefulness(
        network=recipe.network,
        size=recipe.size,
        seeds=seeds,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        bfloat16=recipe.bfloat16,
        weights=str(weights) if weights else None,
        device=str(device),
        labels=labels,
        positive=labels[exam.positive],
        chosen_on=str(real_valid) if real_valid else None,
        resampled="patients and seeds" if len(set(patients)) < len(patients) else "photographs and seeds",
        draws=DRAWS,
        sources=_sources(origins, pictures, exam, warned),
        skipped=[{"file": str(path), "reason": why} for each in pictures.values() for path, why in each.skipped],
        warnings=warned,
    )
    _caution(result, origins, exam)
    _measure(result, pictures, exam, recipe, range(seed, seed + seeds), device, progress)
    return result


def _measure(
    result: Usefulness,
    pictures: Mapping[str, Pictures],
    exam: Examination,
    recipe: Recipe,
    seeds: range,
    device: torch.device,
    progress: Progress,
) -> None:
    """Train and judge row by row; fills ``result``."""
    trainings = {REAL: pictures[TRAIN]}
    if FAKE in pictures:
        trainings |= {SYNTHETIC: pictures[FAKE], BOTH: join(pictures[TRAIN], pictures[FAKE])}
    valid = pictures.get(VALID)
    choose = (valid, figure_to_choose_by(valid.classes_N, exam.positive)) if valid else None
    roc: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for trained_on, images in trainings.items():
        looked_at = {TEST: pictures[TEST], JUDGING: valid or images}
        if trained_on == REAL and FAKE in pictures:
            looked_at[FAKE] = pictures[FAKE]
        logits: dict[str, list[np.ndarray]] = {side: [] for side in looked_at}
        kept = []
        with progress(f"classifiers trained on {trained_on}", len(seeds) * recipe.steps) as bar:
            for seed in seeds:
                found = train_classifier(
                    images, len(exam.labels), recipe, seed=seed, choose=choose, device=device, bar=bar
                )
                kept.append(found.step)
                for side, shown in looked_at.items():
                    logits[side].append(found.logits(shown))
        judging_N = looked_at[JUDGING].classes_N
        chosen = [choose_thresholds(each, judging_N, exam.positive) for each in logits[JUDGING]]
        n_train = {label: int((images.classes_N == number).sum()) for number, label in enumerate(exam.labels)}
        result.rows.append(
            judge(exam, trained_on, n_train, logits[TEST], chosen, kept_steps=kept, chosen_on=result.chosen_on)
        )
        roc[trained_on] = exam.roc(logits[TEST])
        if trained_on == REAL:
            together = {side: vote(each) for side, each in logits.items()}
            cut = choose_thresholds(together[JUDGING], judging_N, exam.positive)
            agreements = {
                side: _agreement(decide(each, cut, exam.positive), looked_at[side].classes_N, exam.labels)
                for side, each in together.items()
            }
            result.real_agreement, result.class_fidelity = agreements[TEST], agreements.get(FAKE, [])
        else:
            between = tuple(mine - real for mine, real in zip(roc[trained_on], roc[REAL], strict=True))
            result.differences.append(Difference(trained_on, REAL, exam.figure((between[0], between[1]))))


def vote(logits_SNK: Sequence[np.ndarray]) -> np.ndarray:
    """fp64 [n, K]: the mean over the classifiers of their log probabilities."""
    logits = np.stack(logits_SNK).astype(np.float64)
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)).mean(0)


def _agreement(decided_N: np.ndarray, classes_N: np.ndarray, labels: Sequence[str]) -> list[Agreement]:
    found = []
    for number, label in enumerate(labels):
        right = decided_N[classes_N == number] == number
        found.append(Agreement(label, len(right), float(right.mean()), wilson(int(right.sum()), len(right))))
    return found


def _sources(
    origins: Mapping[str, Sequence[Origin]], pictures: Mapping[str, Pictures], exam: Examination, warned: list[str]
) -> dict[str, object] | None:
    """The tie of label and source in the training photographs, and what knowing the source alone is worth."""
    sources = [origin.source for origin in origins[TRAIN]]
    found = tie(sources, [exam.labels[number] for number in pictures[TRAIN].classes_N])
    if found is None:
        return None
    scores_NK = source_scores(sources, pictures[TRAIN].classes_N, exam.sources, len(exam.labels))
    logits_NK = np.log(scores_NK.clip(1e-6))
    alone = exam.figure(exam.roc([logits_NK] * exam.draws.seeds_DS.shape[1]))
    if warning := tie_warning(found, alone.mean, exam.counts):
        warned.append(warning)
    return {
        "counts": found.counts,
        "association": found.association,
        "p": found.p,
        "single_class": found.single,
        "every_class": found.both,
        "tied": found.tied,
        "source_alone_auroc": asdict(alone),
    }


def _caution(result: Usefulness, origins: Mapping[str, Sequence[Origin]], exam: Examination) -> None:
    """What a reader of the figures should know."""
    said = result.warnings
    if all(origin.source is None for origin in origins[TRAIN]):
        said.append(
            "neither a manifest nor the file names tell the sources of the photographs: if one class comes from other "
            "cameras than another, a classifier reads the camera, and no figure here tells"
        )
    test = {origin.patient for origin in origins[TEST]}
    for side in (TRAIN, VALID):
        if shared := test & {origin.patient for origin in origins.get(side, ())}:
            said.append(f"{len(shared)} patients have photographs on the test side and the {side} side")
    if few := [f"{label} {n}" for label, n in exam.counts.items() if n < FEW]:
        said.append(f"fewer than {FEW} test photographs ({', '.join(few)}): the figures are weak")
    if result.chosen_on is None:
        said.append(
            "no validation folder: the last state of each training counts, with a threshold from its training images"
        )
    if result.seeds == 1:
        said.append("one seed: the intervals do not show how much a training varies")
    if result.skipped:
        said.append(f"{len(result.skipped)} files could not be used and are left out")
