"""What real images score against real images: the best that any generator could reach at its count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.fid import frechet_distance

FLOOR_DRAWS = 10
Metric = Callable[[np.ndarray, np.ndarray], float]
Metrics = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Floor:
    """A metric between real images: ``draws`` samples of ``n_sample`` images against ``n_reference`` others.

    ``source`` says where the samples came from; ``sd`` is over the draws, None for a single one.
    """

    mean: float
    sd: float | None
    draws: int
    n_sample: int
    n_reference: int
    source: str


def real_floor(
    real: Sequence[np.ndarray],
    counts: Sequence[int],
    pool: Sequence[np.ndarray] | None = None,
    metric: Metric = frechet_distance,
    draws: int = FLOOR_DRAWS,
    seed: int = 0,
    source: str = "",
) -> Floor:
    """``real_floors`` of a single metric."""
    return real_floors(real, counts, pool, lambda *sides: {"": metric(*sides)}, draws, seed, source)[""]


def real_floors(
    real: Sequence[np.ndarray],
    counts: Sequence[int],
    pool: Sequence[np.ndarray] | None,
    measure: Metrics,
    draws: int = FLOOR_DRAWS,
    seed: int = 0,
    source: str = "",
) -> dict[str, Floor]:
    """What perfect images would score: real against real at the count of the fakes, the mean of ``draws`` samples.

    ``real``, ``pool`` and ``counts`` run over classes (a single one for a class alone), so that every sample has the
    class shares of the fakes. With a ``pool`` of other real images each sample comes from it and is set against all of
    ``real``, as the fakes are. Without, each sample of ``real`` is set against the rest of it: the reference is then
    smaller, and no sample is larger than half of a class, both of which raise FID a little and move the others.
    Samples without replacement; different draws may share images. The same seed gives the same samples.
    """
    rng = np.random.default_rng(seed)
    origin = real if pool is None else pool
    most = [len(rows) if pool is not None else len(rows) // 2 for rows in origin]
    sizes = [min(pair) for pair in zip(counts, most, strict=True)]
    if sum(sizes) < 2:
        raise InputError(
            f"Expected enough real images for samples of 2 or more, found {sum(len(rows) for rows in origin)}: "
            "leave out the floor, or give more with --floor-from DIR."
        )
    if pool is not None and sizes == [len(rows) for rows in pool]:
        draws = 1  # every sample would be the same: all of the pool
    scores: list[dict[str, float]] = []
    for _ in range(draws):
        orders = [rng.permutation(len(rows)) for rows in origin]
        sample = _pick(origin, [order[:size] for order, size in zip(orders, sizes, strict=True)])
        rest = [order[size:] for order, size in zip(orders, sizes, strict=True)]
        reference = np.concatenate(list(real)) if pool is not None else _pick(origin, rest)
        scores.append(measure(reference, sample))
    floors = {}
    for name in scores[0]:
        values = [each[name] for each in scores]
        sd = float(np.std(values, ddof=1)) if draws > 1 else None
        floors[name] = Floor(float(np.mean(values)), sd, draws, sum(sizes), len(reference), source)
    return floors


def _pick(classes: Sequence[np.ndarray], chosen: Sequence[np.ndarray]) -> np.ndarray:
    # Sorted, so that a sum over the rows does not depend on the order of the draw.
    return np.concatenate([rows[np.sort(index)] for rows, index in zip(classes, chosen, strict=True)])
