"""Features by class in, scores out: every metric with its counts, its floor and its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.bootstrap import deviations, fits, interval, smallest_half
from retinar.engine.metrics.fid import frechet_distance, frechet_distance_of_grams
from retinar.engine.metrics.floor import Floor, real_floors
from retinar.engine.metrics.grams import Grams
from retinar.engine.metrics.kid import kernel_distance, kernel_distance_of_grams
from retinar.engine.metrics.manifold import LEAST, manifold_interval, manifold_scores, manifold_scores_of_grams
from retinar.engine.metrics.manifold import NAMES as MANIFOLD
from retinar.engine.progress import Progress, silent

ALL = "all"
Classes = dict[str, np.ndarray]
"""Class name -> fp32 [n, 2048] features; the single class ALL where a folder has no subfolders."""


@dataclass(frozen=True)
class Family:
    """Metrics that are computed together, from features or from their inner products (and their number).

    ``interval`` takes (name, value, deviation of half samples, real images, fake ones). ``least``: the images a side
    without which there are no figures.
    """

    names: tuple[str, ...]
    of_features: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    of_grams: Callable[[Grams, int], dict[str, float]]
    interval: Callable[[str, float, float, int, int], tuple[float, float]]
    least: int


FAMILIES = (
    Family(
        ("fid",),
        lambda real, fake: {"fid": frechet_distance(real, fake)},
        lambda grams, _: {"fid": frechet_distance_of_grams(grams)},
        lambda name, value, deviation, n, m: interval(value, deviation, lowest=0.0),
        least=2,
    ),
    Family(
        ("kid",),
        lambda real, fake: {"kid": kernel_distance(real, fake)},
        lambda grams, features: {"kid": kernel_distance_of_grams(grams, features)},
        lambda name, value, deviation, n, m: interval(value, deviation),
        least=2,
    ),
    Family(
        MANIFOLD,
        manifold_scores,
        lambda grams, _: manifold_scores_of_grams(grams),
        manifold_interval,
        least=LEAST,
    ),
)
METRICS = tuple(name for family in FAMILIES for name in family.names)
GROUPS = {"prdc": MANIFOLD, "all": METRICS}


@dataclass(frozen=True)
class Score:
    """Every metric of one class (or of ALL together) in one mode, beside the counts it rests on.

    ``floor`` and ``intervals`` (95 %) have the metrics' names; a metric is missing there where the images are too few.
    """

    label: str
    mode: str
    n_real: int
    n_fake: int
    metrics: dict[str, float]
    floor: dict[str, Floor] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def check_metrics(names: Sequence[str]) -> list[str]:
    """The metrics of these names, "prdc" and "all" written out, each once. InputError for an unknown one or none."""
    if not names:
        raise InputError(f"Expected at least one metric among {', '.join(METRICS)}, found none: name one.")
    for name in names:
        if name not in METRICS and name not in GROUPS:
            known = ", ".join([*METRICS, *GROUPS])
            raise InputError(f"Expected metrics among {known}, found {name!r}: name those.")
    return list(dict.fromkeys(each for name in names for each in GROUPS.get(name, (name,))))


def measure(names: Sequence[str], real_NF: np.ndarray, fake_MF: np.ndarray) -> dict[str, float]:
    """These metrics of two feature sets, in the order of ``names``. InputError where a side has too few rows."""
    found: dict[str, float] = {}
    for family in _wanted(names):
        found |= family.of_features(real_NF, fake_MF)
    return {name: found[name] for name in names}


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
    bootstrap: int = 0,
    paired: bool = False,
    progress: Progress = silent,
) -> list[Score]:
    """Scores of features by class, then of all classes together (the label ALL; last).

    ``floor``: see ``real_floors``. ``bootstrap``: the draws behind the intervals (see ``bootstrap``), none where 0;
    ``paired``: image i of a real class belongs to image i of the fake one, as copies do.
    """
    groups = [[label] for label in real if label != ALL]
    if len(groups) != 1:
        groups.append(list(real))
    names = check_metrics(metrics)
    scores = []
    for group in groups:
        name = group[0] if len(group) == 1 else ALL
        reals, fakes = [real[label] for label in group], [fake[label] for label in group]
        pools = [pool[label] for label in group] if pool is not None else None
        values = measure(names, np.concatenate(reals), np.concatenate(fakes))
        floors = floors_of(names, reals, [len(rows) for rows in fakes], pools, seed, pool_name) if floor else {}
        spans = intervals_of(
            values, reals, fakes, bootstrap, seed, paired=paired, progress=progress, title=f"{mode} intervals of {name}"
        )
        counts = [sum(len(rows) for rows in side) for side in (reals, fakes)]
        scores.append(Score(name, mode, counts[0], counts[1], values, floors, spans))
    return scores


def floors_of(
    names: Sequence[str],
    real: Sequence[np.ndarray],
    counts: Sequence[int],
    pool: Sequence[np.ndarray] | None,
    seed: int,
    source: str,
) -> dict[str, Floor]:
    """The floor of each metric that the samples have images enough for."""

    def measured(reference: np.ndarray, sample: np.ndarray) -> dict[str, float]:
        few = min(len(reference), len(sample))
        return measure([name for name in names if family_of(name).least <= max(2, few)], reference, sample)

    return real_floors(real, counts, pool, measured, seed=seed, source=source)


def intervals_of(
    values: Mapping[str, float],
    real: Sequence[np.ndarray],
    fake: Sequence[np.ndarray],
    draws: int,
    seed: int = 0,
    *,
    paired: bool = False,
    progress: Progress = silent,
    title: str = "intervals",
) -> dict[str, tuple[float, float]]:
    """A 95 % interval around each value that halves of the images are enough for; none where ``draws`` is 0."""
    sizes = {"real": [len(rows) for rows in real], "fake": [len(rows) for rows in fake]}
    counts = {side: sum(each) for side, each in sizes.items()}
    half = min(smallest_half(each) for each in sizes.values())
    families = [family for family in _wanted(list(values)) if family.least <= half]
    if not draws or not families or not fits(counts["real"], counts["fake"]):
        return {}
    features = real[0].shape[1]

    def measured(grams: Grams) -> dict[str, float]:
        found: dict[str, float] = {}
        for family in families:
            found |= family.of_grams(grams, features)
        return found

    with progress(title, max(2, draws)) as bar:
        grams = Grams.of(np.concatenate(real), np.concatenate(fake))
        found = deviations(
            grams, sizes["real"], sizes["fake"], measured, draws=draws, seed=seed, paired=paired, step=bar.advance
        )
    return {
        name: family_of(name).interval(name, value, found[name], counts["real"], counts["fake"])
        for name, value in values.items()
        if name in found
    }


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if name in family.names)


def _wanted(names: Sequence[str]) -> list[Family]:
    return [family for family in FAMILIES if set(names) & set(family.names)]
