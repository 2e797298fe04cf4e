"""From the distances of a search to flags, shares and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retinar.engine.metrics.copies import KINDS
from retinar.engine.metrics.heldout import Share, Threshold, closer, crossed_share, excess, share_below, threshold_of
from retinar.engine.metrics.neighbours import Nearest

INCEPTION, LPIPS_NAME, STRUCTURE, ANY = "inception", "lpips", "structure", "any"
TRAIN, GENERATED, HELD_OUT = "train", "generated", "held_out"
LEAK = 0.4
"""A held-out photograph is taken for a training image below this share of the held-out photographs' median distance of
structure. Of 1,335 of them, with a median of 0.69, one lay there (0.10: a training photograph in other colours); the
next, another eye, had 0.34."""
TINY = 1e-12
"""Instead of a threshold of 0."""


@dataclass(frozen=True)
class Found:
    """How many of ``n`` training images that were changed in one way are flagged."""

    kind: str
    n: int
    flagged: int
    share: float


@dataclass(frozen=True)
class Measure:
    """One distance: "inception" (Euclidean, clean features), "lpips", "structure" (``structure``), or "any".

    "any" is the smallest of them as a multiple of its threshold, with a threshold of its own, so that it too flags the
    quantile of new photographs. ``false_alarms`` is the share of new photographs that the threshold flags on average,
    ``false_alarms_range`` that share's 95 % range over draws of the held-out photographs. ``held_out`` is what
    thresholds from nine tenths of the held-out photographs flag in the rest. ``excess`` is the probability of so many
    flagged images without copying, ``closer`` that of a generated image to be nearer than a held-out photograph, and
    ``z`` its rank test's score (``heldout``). ``copies``: how many changed training images it flags.
    """

    measure: str
    threshold: float
    false_alarms: float
    false_alarms_range: tuple[float, float]
    generated: Share
    held_out: Share
    excess: float
    closer: float
    z: float
    copies: list[Found] = field(default_factory=list)


@dataclass(frozen=True)
class PairOf:
    """An image (``generated``; a held-out one in ``held_out_pairs``) and its nearest training image.

    ``inception``, ``lpips`` and ``structure`` are the smallest distances by each measure; where they are to different
    training images (``agree`` is false), ``train`` and ``mirrored`` are those of ``by``, the measure by which it is
    nearest in multiples of the threshold: ``nearness``, by which pairs are sorted. ``flagged`` is by "any", so that the
    quantile of new photographs is flagged in all; ``flagged_by`` names the single measures that would. ``exact``: the
    pixels are equal.
    """

    generated: str
    train: str
    mirrored: bool
    inception: float
    lpips: float | None
    structure: float
    flagged: bool
    flagged_by: list[str]
    nearness: float
    by: str
    agree: bool
    exact: bool


@dataclass
class Side:
    """Readable images of a folder with their classes, and the nearest training image of each by each measure."""

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    features: np.ndarray
    nearest: dict[str, Nearest] = field(default_factory=dict)

    def __getitem__(self, rows: np.ndarray) -> Side:
        files = tuple(path for path, kept in zip(self.files, rows, strict=True) if kept)
        nearest = {name: found[rows] for name, found in self.nearest.items()}
        return Side(self.root, files, self.labels[rows], self.features[rows], nearest)


def leaked(side: Side, exact: Mapping[Path, tuple[int, bool]]) -> np.ndarray:
    """bool [n]: the photographs that are training images, by their pixels or by a structure that no two eyes share."""
    distances = side.nearest[STRUCTURE].distance
    return np.array([path in exact for path in side.files], bool) | (distances < LEAK * np.median(distances))


def measures_of(sides: Mapping[str, Side], quantile: float, seed: int) -> list[Measure]:
    """Each distance with its threshold, and "any"."""
    single = {name: threshold_of(found.distance, quantile) for name, found in sides[HELD_OUT].nearest.items()}
    distances = distances_of(sides, {name: threshold.value for name, threshold in single.items()})
    thresholds = {**single, ANY: threshold_of(distances[ANY][HELD_OUT], quantile)}
    groups = sides[HELD_OUT].labels
    return [_measure(name, of, thresholds[name], groups, seed) for name, of in distances.items()]


def distances_of(sides: Mapping[str, Side], thresholds: Mapping[str, float]) -> dict[str, dict[str, np.ndarray]]:
    """By measure and side, each image's smallest distance; for "any" the smallest as a multiple of its threshold."""
    found = {name: {side: of.nearest[name].distance for side, of in sides.items()} for name in sides[HELD_OUT].nearest}
    multiples = {
        side: np.min([of[side] / max(thresholds[name], TINY) for name, of in found.items()], axis=0) for side in sides
    }
    return {**found, ANY: multiples}


def _measure(
    name: str, distances: dict[str, np.ndarray], threshold: Threshold, groups: np.ndarray, seed: int
) -> Measure:
    generated, held_out = distances[GENERATED], distances[HELD_OUT]
    share = share_below(generated, threshold, held_out)
    probability, z = closer(generated, held_out)
    made = {kind: (distances[kind] < threshold.value) for kind in KINDS if len(distances.get(kind, ()))}
    return Measure(
        measure=name,
        threshold=threshold.value,
        false_alarms=threshold.expected,
        false_alarms_range=threshold.range,
        generated=share,
        held_out=crossed_share(held_out, groups, threshold.quantile, seed),
        excess=excess(share, threshold),
        closer=probability,
        z=z,
        copies=[Found(kind, len(hit), int(hit.sum()), float(hit.mean())) for kind, hit in made.items()],
    )


def pairs_of(
    side: Side, train: Sequence[Path], measures: Sequence[Measure], exact: Mapping[Path, tuple[int, bool]]
) -> list[PairOf]:
    """Every image of ``side`` beside a training image, closest first. Equal pixels are flagged in any case."""
    limits = {each.measure: max(each.threshold, TINY) for each in measures}
    names = list(side.nearest)
    pairs = []
    for row, path in enumerate(side.files):
        multiples = {name: float(side.nearest[name].distance[row]) / limits[name] for name in names}
        by = min(names, key=multiples.__getitem__)
        index, mirrored = side.nearest[by].index[row], side.nearest[by].mirrored[row]
        if path in exact:
            index, mirrored = exact[path]
        pairs.append(
            PairOf(
                generated=str(path),
                train=str(train[index]),
                mirrored=bool(mirrored),
                inception=float(side.nearest[INCEPTION].distance[row]),
                lpips=float(side.nearest[LPIPS_NAME].distance[row]) if LPIPS_NAME in names else None,
                structure=float(side.nearest[STRUCTURE].distance[row]),
                flagged=path in exact or multiples[by] < limits[ANY],
                flagged_by=[name for name in names if multiples[name] < 1],
                nearness=multiples[by],
                by=by,
                agree=len({int(side.nearest[name].index[row]) for name in names}) == 1,
                exact=path in exact,
            )
        )
    return sorted(pairs, key=lambda pair: (pair.nearness, pair.generated))
