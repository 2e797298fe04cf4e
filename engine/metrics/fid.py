"""The Fréchet distance between two sets of features, and what it would be between real images alone.

Heusel et al. 2017: |mu_1 - mu_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), C the unbiased covariances.

The trace of the root needs no matrix root. With the centred features A and B, divided by sqrt(n - 1), C_1 = A^T A and
C_2 = B^T B; the eigenvalues of C_1 C_2 that are not zero are those of (A B^T)(A B^T)^T, so the trace is the sum of the
singular values of A B^T. For fewer images than the 2,048 features both covariances are singular and the usual
``sqrtm`` of their product works on rounding errors for half a minute; this is exact to 1e-9 in milliseconds, and a test
holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retinar.engine.errors import InputError

FLOOR_DRAWS = 10
Metric = Callable[[np.ndarray, np.ndarray], float]


def frechet_distance(real_NF: np.ndarray, fake_MF: np.ndarray) -> float:
    """FID of two feature sets (at least two rows each, any real dtype; computed in fp64)."""
    if min(len(real_NF), len(fake_MF)) < 2:
        raise InputError(
            f"Expected at least 2 images on each side for FID, found {len(real_NF)} and {len(fake_MF)}: add images."
        )
    mean_real, root_real = _root(real_NF)
    mean_fake, root_fake = _root(fake_MF)
    trace = np.linalg.svd(root_real @ root_fake.T, compute_uv=False).sum()
    shift = mean_real - mean_fake
    distance = shift @ shift + (root_real**2).sum() + (root_fake**2).sum() - 2 * trace
    return max(0.0, float(distance))  # below zero there are only rounding errors


def _root(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and a matrix R of at most F rows with R^T R = the unbiased covariance."""
    features = np.asarray(features_NF, np.float64)
    mean = features.mean(axis=0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    if len(centred) <= centred.shape[1]:
        return mean, centred
    return mean, np.asarray(np.linalg.qr(centred, mode="r"))


METRICS: dict[str, Metric] = {"fid": frechet_distance}
"""Name -> function of (real features, fake features)."""


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
    """What perfect images would score: real against real at the count of the fakes, the mean of ``draws`` samples.

    ``real``, ``pool`` and ``counts`` run over classes (a single one for a class alone), so that every sample has the
    class shares of the fakes. With a ``pool`` of other real images each sample comes from it and is set against all of
    ``real``, as the fakes are. Without, each sample of ``real`` is set against the rest of it: the reference is then
    smaller, and no sample is larger than half of a class, both of which raise the floor a little.
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
    scores = []
    for _ in range(draws):
        orders = [rng.permutation(len(rows)) for rows in origin]
        sample = _pick(origin, [order[:size] for order, size in zip(orders, sizes, strict=True)])
        rest = [order[size:] for order, size in zip(orders, sizes, strict=True)]
        reference = np.concatenate(list(real)) if pool is not None else _pick(origin, rest)
        scores.append(metric(reference, sample))
    sd = float(np.std(scores, ddof=1)) if draws > 1 else None
    return Floor(float(np.mean(scores)), sd, draws, sum(sizes), len(reference), source)


def _pick(classes: Sequence[np.ndarray], chosen: Sequence[np.ndarray]) -> np.ndarray:
    # Sorted, so that a sum over the rows does not depend on the order of the draw.
    return np.concatenate([rows[np.sort(index)] for rows, index in zip(classes, chosen, strict=True)])
