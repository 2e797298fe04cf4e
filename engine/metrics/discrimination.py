"""How well scores tell classes apart, and how far that may be chance: AUROC, sensitivity, accuracy and intervals.

Intervals come from a bootstrap over the test photographs by patient (two eyes of one patient are no independent
evidence) together with the seeds: every draw takes patients and seeds with replacement, and averages the figure of the
patients drawn over the seeds drawn. So an interval speaks of other patients and of other trainings. With few seeds the
second part is too small: of S seeds a draw shows (S - 1) / S of their variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.inception import INSTALL

SPECIFICITY = 0.95


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation (None of one seed) over the seeds, and a 95 % interval (see above)."""

    mean: float
    sd: float | None
    interval: tuple[float, float]


def auroc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Area under the ROC curve (scikit-learn): the share of (positive, negative) pairs in order, ties one half.

    ``scores_N`` float, larger for the positive class; ``positive_N`` bool. NaN where a class is missing.
    """
    if positive_N.all() or not positive_N.any():
        return float("nan")
    return float(_sklearn().roc_auc_score(positive_N, scores_N))


def sensitivity_at(scores_N: np.ndarray, positive_N: np.ndarray, specificity: float = SPECIFICITY) -> float:
    """The largest sensitivity of any threshold with at least that specificity on the same photographs.

    It is the point of the ROC curve (scikit-learn's, not interpolated). NaN where a class is missing.
    """
    if positive_N.all() or not positive_N.any():
        return float("nan")
    wrong, right, _ = _sklearn().roc_curve(positive_N, scores_N, drop_intermediate=False)
    return float(right[wrong <= 1 - specificity + 1e-12].max())


def _sklearn():  # type: ignore[no-untyped-def]  # a module without types
    try:
        from sklearn import metrics
    except ImportError as error:
        raise InputError(
            f"Expected the package scikit-learn for ROC curves, found none ({error}): {INSTALL}."
        ) from error
    return metrics


def best_threshold(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """The threshold of the highest balanced accuracy (Youden's J), in the middle between two scores.

    A photograph is called positive where its score is above it. The middle one of equally good thresholds is taken.
    """
    order = np.argsort(scores_N)
    ordered, positive = scores_N[order].astype(np.float64), positive_N[order]
    found = 1 - np.cumsum(positive) / positive.sum() + np.cumsum(~positive) / (~positive).sum()
    found[:-1][ordered[1:] == ordered[:-1]] = -1  # no threshold passes between equal scores
    best = np.flatnonzero(found[:-1] >= found[:-1].max(initial=-1) - 1e-12)
    if len(best) == 0 or found[best[0]] < 0:
        return float(ordered[0])
    at = best[len(best) // 2]
    return float((ordered[at] + ordered[at + 1]) / 2)


def threshold_at(scores_N: np.ndarray, positive_N: np.ndarray, specificity: float = SPECIFICITY) -> float:
    """The lowest threshold with at least that specificity where a score above it is called positive."""
    negative_N = np.sort(scores_N[~positive_N])
    return float(negative_N[max(0, int(np.ceil(specificity * len(negative_N) - 1e-9)) - 1)])


def wilson(successes: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share (95 %); (0, 1) of nothing. Source: Wilson (1927)."""
    if count == 0:
        return 0.0, 1.0
    share, square = successes / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z * (share * (1 - share) / count + square / (4 * count)) ** 0.5 / (1 + square)
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == count else middle + half


@dataclass(frozen=True)
class Draws:
    """``weights_DN``: how often draw D holds test photograph N; ``seeds_DS``: how often it holds seed S."""

    weights_DN: np.ndarray
    seeds_DS: np.ndarray

    def interval(self, values_SD: np.ndarray) -> tuple[float, float]:
        """95 % interval of figures by seed and draw; draws without a value (a class was missing) are left out."""
        mean_D = (self.seeds_DS * values_SD.T).sum(1) / self.seeds_DS.sum(1)
        kept = mean_D[np.isfinite(mean_D)]
        if len(kept) == 0:
            return float("nan"), float("nan")
        low, high = np.quantile(kept, (0.025, 0.975))
        return float(low), float(high)


def draw_samples(patients: Sequence[str], seeds: int, draws: int, seed: int) -> Draws:
    """Bootstrap draws of patients and seeds, each with replacement; shared by all rows, so that differences pair."""
    rng = np.random.default_rng(seed)
    _, patient_of_N = np.unique(np.asarray(patients), return_inverse=True)
    count = int(patient_of_N.max(initial=-1)) + 1
    weights_DP = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    return Draws(weights_DP[:, patient_of_N], rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws))


def weighted_auroc(scores_N: np.ndarray, positive_N: np.ndarray, weights_DN: np.ndarray) -> np.ndarray:
    """fp64 [D]: AUROC of every draw; equal to scikit-learn's with ``sample_weight``."""
    up_DG, down_DG = _grouped(scores_N, positive_N, weights_DN)
    below_DG = np.cumsum(down_DG, 1) - down_DG / 2
    with np.errstate(invalid="ignore"):
        return (up_DG * below_DG).sum(1) / (up_DG.sum(1) * down_DG.sum(1))


def weighted_sensitivity(
    scores_N: np.ndarray, positive_N: np.ndarray, weights_DN: np.ndarray, specificity: float = SPECIFICITY
) -> np.ndarray:
    """fp64 [D]: ``sensitivity_at`` of every draw."""
    up_DG, down_DG = _grouped(scores_N, positive_N, weights_DN)
    with np.errstate(invalid="ignore"):
        wrong_DG = np.cumsum(down_DG[:, ::-1], 1) / down_DG.sum(1, keepdims=True)
        right_DG = np.cumsum(up_DG[:, ::-1], 1) / up_DG.sum(1, keepdims=True)
    best_D = np.where(wrong_DG <= 1 - specificity + 1e-12, right_DG, 0).max(1)
    return np.where(np.isfinite(wrong_DG[:, -1] + right_DG[:, -1]), best_D, np.nan)


def _grouped(scores_N: np.ndarray, positive_N: np.ndarray, weights_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp64 [D, G] twice: the weight of positives and of negatives at each distinct score, scores rising."""
    order = np.argsort(scores_N, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores_N[order]) > 0])
    ordered_DN = weights_DN[:, order].astype(np.float64)
    up_N = positive_N[order]
    return np.add.reduceat(ordered_DN * up_N, starts, 1), np.add.reduceat(ordered_DN * ~up_N, starts, 1)
