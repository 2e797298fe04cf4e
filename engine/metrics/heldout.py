"""How far is near: a threshold from held-out photographs, and what counts below it can say.

A held-out photograph is by construction no copy, so the distances of held-out photographs to the training images are
what chance and the likeness of all eyes give. The share of generated images below a low quantile of theirs is compared
with that quantile; every function here is exact for a finite count, without resampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Interval = tuple[float, float]
FOLDS = 10


@dataclass(frozen=True)
class Share:
    """``flagged`` of ``n`` images below a threshold; ``interval`` is the 95 % one of Clopper and Pearson (1934).

    It holds the threshold for fixed; ``with_threshold`` allows for the threshold's own error too (``share_below``).
    """

    n: int
    flagged: int
    share: float
    interval: Interval
    with_threshold: Interval | None = None


@dataclass(frozen=True)
class Threshold:
    """``value`` estimates the ``quantile`` of the distances of all photographs that might have been held out.

    ``expected`` is the share of new held-out photographs that falls below it on average (the quantile itself, or
    1 / (n + 1) where there are too few), ``range`` the share's 95 % range over draws of the n held-out photographs.
    """

    value: float
    n: int
    quantile: float
    expected: float
    range: Interval


def threshold_of(distances: np.ndarray, quantile: float) -> Threshold:
    """The ``quantile`` of n distances: order statistic (n + 1) q, between two of them in proportion.

    With that rank (Hyndman and Fan 1996, type 6) a new photograph falls below the k-th smallest of n exchangeable ones
    with probability k / (n + 1), whatever their distribution; the probability itself varies as Beta(k, n + 1 - k).
    Where n + 1 < 1 / q, the smallest distance is taken.
    """
    from scipy.stats import beta

    if not len(distances):
        raise ValueError("expected at least one held-out distance, got none")
    n = len(distances)
    rank = max(1.0, (n + 1) * quantile)
    value = float(np.quantile(distances, quantile, method="weibull"))
    low, high = beta.ppf([0.025, 0.975], rank, n + 1 - rank)
    return Threshold(value, n, quantile, rank / (n + 1), (float(low), float(high)))


def clopper_pearson(flagged: int, n: int, level: float = 0.95) -> Interval:
    """The exact interval of a binomial share; (0, 1) without images."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, flagged, n - flagged + 1)) if flagged else 0.0
    high = float(beta.ppf(1 - tail, flagged + 1, n - flagged)) if flagged < n else 1.0
    return low, high


def plain_share(flagged: int, n: int) -> Share:
    return Share(n, flagged, flagged / n if n else float("nan"), clopper_pearson(flagged, n))


def share_below(distances: np.ndarray, threshold: Threshold, held_out: np.ndarray) -> Share:
    """The share of ``distances`` under the threshold that was taken from ``held_out``.

    ``with_threshold`` is a 95 % interval of the share below the *true* quantile: the quantile lies between two order
    statistics of the held-out distances with 97.5 %, and each bound of the share is Clopper's and Pearson's at the
    worse of the two, with 97.5 % again.
    """
    from scipy.stats import binom

    n, held = len(distances), np.sort(held_out)
    below, above = binom.ppf([0.0125, 0.9875], len(held), threshold.quantile)
    lowest = held[int(below) - 1] if below >= 1 else -np.inf
    highest = held[int(above)] if above < len(held) else np.inf
    wide = (
        clopper_pearson(int((distances < lowest).sum()), n, 0.975)[0],
        clopper_pearson(int((distances < highest).sum()), n, 0.975)[1],
    )
    flagged = int((distances < threshold.value).sum())
    return Share(n, flagged, flagged / n if n else float("nan"), clopper_pearson(flagged, n), wide)


def excess(share: Share, threshold: Threshold) -> float:
    """The probability of at least so many flagged images if they were exchangeable with the held-out photographs.

    Beta-binomial, since the share below an order statistic is a Beta variable: the threshold's own error is in it.
    """
    from scipy.stats import betabinom

    rank = threshold.expected * (threshold.n + 1)
    return float(betabinom.sf(share.flagged - 1, share.n, rank, threshold.n + 1 - rank))


def crossed_share(distances: np.ndarray, groups: np.ndarray, quantile: float, seed: int) -> Share:
    """What the threshold flags among photographs that it was not taken from: each tenth against the rest's quantile.

    ``groups`` (labels [n]) are dealt out evenly one by one. A tenth that lies nearer lowers the thresholds of the
    others, so that the sum spreads less than a binomial count and the interval covers the quantile more often than
    95 %. It shows ties and counts too small for the quantile; whether other photographs keep to the threshold, only
    another split shows, given as the generated images.
    """
    rng = np.random.default_rng(seed)
    fold = np.zeros(len(distances), np.int64)
    first = 0
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        fold[members] = (first + np.arange(len(members))) % FOLDS
        first += len(members)
    flagged = 0
    for part in range(FOLDS):
        mine = fold == part
        if mine.any() and not mine.all():
            flagged += int((distances[mine] < threshold_of(distances[~mine], quantile).value).sum())
    return plain_share(flagged, len(distances))


def closer(generated: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """(probability that a generated image is nearer to its training image than a held-out photograph is, z score).

    The rank test of Meehan, Chaudhuri and Dasgupta (2020, "A Non-Parametric Test to Detect Data-Copying in Generative
    Models") over the whole space in one cell: 0.5 for a model as far from its training images as new photographs are;
    z above 3 means copying, z below -3 images further off than photographs, which a blurred or distorted model gives
    as well.
    """
    from scipy.stats import mannwhitneyu

    m, n = len(generated), len(held_out)
    if not m or not n:
        return float("nan"), float("nan")
    # Only the statistic is taken; scipy's exact p value of few against many would take minutes.
    smaller = m * n - float(mannwhitneyu(generated, held_out, method="asymptotic").statistic)
    _, ties = np.unique(np.concatenate([generated, held_out]), return_counts=True)
    total = m + n
    variance = m * n / 12 * (total + 1 - float((ties.astype(float) ** 3 - ties).sum()) / (total * max(1, total - 1)))
    return smaller / (m * n), float((smaller - m * n / 2) / np.sqrt(variance)) if variance > 0 else 0.0
