"""What several classifiers of the same kind (one a seed) make of the same test photographs, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retinar.engine.metrics.discrimination import (
    Draws,
    Figure,
    auroc,
    best_threshold,
    sensitivity_at,
    threshold_at,
    weighted_auroc,
    weighted_sensitivity,
    wilson,
)


@dataclass(frozen=True)
class SourceRow:
    """AUROC among the photographs of one source that holds every class; ``n`` counts them by class."""

    source: str
    n: dict[str, int]
    auroc: Figure


@dataclass(frozen=True)
class OperatingPoint:
    """Sensitivity and specificity on the test photographs at a threshold with 95 % specificity on the others."""

    chosen_on: str
    sensitivity: Figure
    specificity: Figure


@dataclass(frozen=True)
class Row:
    """Classifiers trained on ``real``, ``synthetic`` or ``both``, judged on real test photographs.

    ``within_sources`` is the AUROC among pairs of the same source, over all sources that hold every class: knowing a
    source gains nothing there. ``kept_steps`` holds the step of each seed whose state was kept.
    """

    trained_on: str
    n_train: dict[str, int]
    n_test: dict[str, int]
    auroc: Figure
    accuracy: Figure
    balanced_accuracy: Figure
    sensitivity_at_95_specificity: Figure
    operating_point: OperatingPoint | None
    within_sources: Figure | None
    by_source: list[SourceRow]
    kept_steps: list[int]


@dataclass(frozen=True)
class Examination:
    """The test photographs: class numbers, sources, draws for intervals, and which class counts as positive.

    With more than two classes every figure of an ROC curve is the mean over the classes, one against the rest.
    """

    labels: list[str]
    classes_N: np.ndarray
    sources: Sequence[str | None]
    draws: Draws
    positive: int

    @property
    def counts(self) -> dict[str, int]:
        return _counts(self.labels, self.classes_N)

    def scores(self, logits_NK: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(class, its scores [n]) of every ROC curve: one of two classes, else one a class."""
        return curves(logits_NK, self.positive)

    def roc(
        self, logits_SNK: Sequence[np.ndarray], name: str = "auroc", keep_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The figure ``auroc`` or ``sensitivity`` by seed [S] and by seed and draw [S, D], of the kept photographs."""
        keep_N = np.ones(len(self.classes_N), bool) if keep_N is None else keep_N
        one, many = {"auroc": (auroc, weighted_auroc), "sensitivity": (sensitivity_at, weighted_sensitivity)}[name]
        weights_DN = self.draws.weights_DN[:, keep_N]
        values, drawn = [], []
        for logits_NK in logits_SNK:
            curves = [(score_N[keep_N], self.classes_N[keep_N] == number) for number, score_N in self.scores(logits_NK)]
            values.append(np.mean([one(*curve) for curve in curves]))
            drawn.append(np.mean([many(*curve, weights_DN) for curve in curves], axis=0))
        return np.array(values), np.stack(drawn)

    def shares(self, right_SN: np.ndarray, keep_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The share of photographs with ``right`` by seed [S] and by seed and draw [S, D]."""
        keep_N = np.ones(len(self.classes_N), bool) if keep_N is None else keep_N
        right_SN, weights_DN = right_SN[:, keep_N].astype(np.float64), self.draws.weights_DN[:, keep_N]
        with np.errstate(invalid="ignore"):
            return right_SN.mean(1), (right_SN @ weights_DN.T) / weights_DN.sum(1)

    def figure(self, found: tuple[np.ndarray, np.ndarray], count: int | None = None) -> Figure:
        """Of the values by seed and by draw. The interval of a share of ``count`` photographs is never narrower than
        Wilson's: where all are right or all are wrong, so they are in every draw.
        """
        values_S, drawn_SD = found
        sd = float(values_S.std(ddof=1)) if len(values_S) > 1 else None
        mean, (low, high) = float(values_S.mean()), self.draws.interval(drawn_SD)
        if count:
            least = wilson(round(mean * count), count)
            low, high = min(low, least[0]), max(high, least[1])
        return Figure(mean, sd, (low, high))

    def of_classes(self, right_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Balanced accuracy: the mean over the classes of the share that is right."""
        parts = [self.shares(right_SN, self.classes_N == number) for number in range(len(self.labels))]
        return np.mean([part[0] for part in parts], axis=0), np.mean([part[1] for part in parts], axis=0)

    def by_source(self, logits_SNK: Sequence[np.ndarray]) -> tuple[list[SourceRow], Figure | None]:
        """AUROC within every source that holds all classes, and over the pairs of the same source of all of these."""
        rows: list[SourceRow] = []
        within: list[tuple[np.ndarray, np.ndarray, float, np.ndarray]] = []
        of_N = np.array([source or "" for source in self.sources])
        for source in sorted(set(of_N) - {""}):
            keep_N = of_N == source
            counts = _counts(self.labels, self.classes_N[keep_N])
            if not all(counts.values()):
                continue
            values_S, drawn_SD = self.roc(logits_SNK, "auroc", keep_N)
            rows.append(SourceRow(source, counts, self.figure((values_S, drawn_SD))))
            pairs_D = np.ones(len(self.draws.weights_DN))
            for number in range(len(self.labels)):
                pairs_D = pairs_D * self.draws.weights_DN[:, keep_N & (self.classes_N == number)].sum(1)
            within.append((values_S, drawn_SD, float(np.prod(list(counts.values()))), pairs_D))
        if not within:
            return rows, None
        with np.errstate(invalid="ignore"):
            value_S = sum(values * pairs for values, _, pairs, _ in within) / sum(pairs for _, _, pairs, _ in within)
            drawn_SD = sum(np.nan_to_num(drawn) * pairs for _, drawn, _, pairs in within) / sum(
                pairs for *_, pairs in within
            )
        return rows, self.figure((np.asarray(value_S), np.asarray(drawn_SD)))


def curves(logits_NK: np.ndarray, positive: int) -> list[tuple[int, np.ndarray]]:
    """(class, its scores) of every ROC curve: the log odds of the positive of two classes, else of every class."""
    if logits_NK.shape[1] == 2:
        return [(positive, logits_NK[:, positive] - logits_NK[:, 1 - positive])]
    found = []
    for number in range(logits_NK.shape[1]):
        rest = np.logaddexp.reduce(np.delete(logits_NK, number, 1).astype(np.float64), axis=1)
        found.append((number, logits_NK[:, number] - rest))
    return found


def figure_to_choose_by(classes_N: np.ndarray, positive: int) -> Callable[[np.ndarray], float]:
    """AUROC of logits [n, K] on photographs of these classes, the mean over the curves."""
    return lambda logits_NK: float(
        np.mean([auroc(scores_N, classes_N == number) for number, scores_N in curves(logits_NK, positive)])
    )


@dataclass(frozen=True)
class Thresholds:
    """Where two classes are told apart: ``balanced`` serves both equally, ``specific`` has 95 % specificity."""

    balanced: float = 0.0
    specific: float = 0.0


def choose_thresholds(logits_NK: np.ndarray, classes_N: np.ndarray, positive: int) -> Thresholds:
    """Thresholds of the log odds on photographs that are not for testing; more than two classes have none."""
    if logits_NK.shape[1] > 2:
        return Thresholds()
    ((number, scores_N),) = curves(logits_NK, positive)
    is_positive = classes_N == number
    return Thresholds(best_threshold(scores_N, is_positive), threshold_at(scores_N, is_positive))


def decide(logits_NK: np.ndarray, thresholds: Thresholds, positive: int) -> np.ndarray:
    """int64 [n] class numbers: by the balanced threshold for two classes, else the largest logit."""
    if logits_NK.shape[1] > 2:
        return logits_NK.argmax(1)
    ((_, scores_N),) = curves(logits_NK, positive)
    return np.where(scores_N > thresholds.balanced, positive, 1 - positive)


def judge(
    exam: Examination,
    trained_on: str,
    n_train: dict[str, int],
    logits_SNK: Sequence[np.ndarray],
    thresholds: Sequence[Thresholds],
    *,
    kept_steps: Sequence[int],
    chosen_on: str | None,
) -> Row:
    """All figures of the logits that the classifier of each seed gives the test photographs."""
    pairs = list(zip(logits_SNK, thresholds, strict=True))
    right_SN = np.stack([decide(logits, each, exam.positive) == exam.classes_N for logits, each in pairs])
    by_source, within = exam.by_source(logits_SNK)
    positives = int((exam.classes_N == exam.positive).sum())
    point = None
    if chosen_on is not None and len(exam.labels) == 2:
        above_SN = np.stack([curves(logits, exam.positive)[0][1] > each.specific for logits, each in pairs])
        positive_N = exam.classes_N == exam.positive
        point = OperatingPoint(
            chosen_on,
            exam.figure(exam.shares(above_SN, positive_N), positives),
            exam.figure(exam.shares(~above_SN, ~positive_N), len(positive_N) - positives),
        )
    return Row(
        trained_on,
        n_train,
        exam.counts,
        exam.figure(exam.roc(logits_SNK)),
        exam.figure(exam.shares(right_SN), len(exam.classes_N)),
        exam.figure(exam.of_classes(right_SN)),
        exam.figure(exam.roc(logits_SNK, "sensitivity"), positives if len(exam.labels) == 2 else None),
        point,
        within,
        by_source,
        list(kept_steps),
    )


def _counts(labels: Sequence[str], classes_N: np.ndarray) -> dict[str, int]:
    return {label: int((classes_N == number).sum()) for number, label in enumerate(labels)}
