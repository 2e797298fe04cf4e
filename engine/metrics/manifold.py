"""Precision, recall, density and coverage: do the fakes lie among the real images, and do they reach them all?

Kynkäänniemi et al. 2019 and Naeem et al. 2020, by the latter's library ``prdc``. Around every image lies a ball that
reaches to its k-th nearest neighbour on its own side. Precision: the share of fakes inside any real ball. Recall: the
share of real images inside any fake ball. Density: how many real balls a fake lies in, over k (may exceed 1). Coverage:
the share of real balls that hold a fake. The figures depend on the counts, as FID does: real images at the same counts
(the floor) say what the best generator could reach, and that is below 1.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.bootstrap import fits, interval, share_interval
from retinar.engine.metrics.discrimination import wilson
from retinar.engine.metrics.grams import Grams
from retinar.engine.metrics.inception import INSTALL

NEAREST = 5
NAMES = ("precision", "recall", "density", "coverage")
LEAST = NEAREST + 2
"""Images a side: the image itself, its k neighbours, and one more, without which ``prdc`` refuses."""
BLOCK = 1024


def manifold_scores(real_NF: np.ndarray, fake_MF: np.ndarray) -> dict[str, float]:
    """The four figures of two feature sets, by ``prdc`` with k = 5; in blocks where that would hold too many distances.

    ``prdc`` holds all of them and an order of each: 30 GB for 50,000 images. Raises InputError for fewer than seven
    rows on a side, and where the package is missing.
    """
    if min(len(real_NF), len(fake_MF)) < LEAST:
        raise InputError(
            f"Expected at least {LEAST} images on each side for precision, recall, density and coverage, "
            f"found {len(real_NF)} and {len(fake_MF)}: add images, or leave these metrics out."
        )
    try:
        from prdc import compute_prdc
    except ImportError as error:
        raise InputError(f"Expected the package prdc for precision and recall, found none ({error}): {INSTALL}.") from (
            error
        )
    if not fits(len(real_NF), len(fake_MF)):
        return manifold_scores_in_blocks(real_NF, fake_MF)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the counts
        found = compute_prdc(real_NF, fake_MF, nearest_k=NEAREST)
    return {name: float(found[name]) for name in NAMES}


def manifold_scores_in_blocks(real_NF: np.ndarray, fake_MF: np.ndarray, block: int = BLOCK) -> dict[str, float]:
    """What ``prdc`` computes, with the distances of ``block`` images at a time in memory."""
    real, fake = np.asarray(real_NF, np.float64), np.asarray(fake_MF, np.float64)
    radius_N, radius_M = (
        np.concatenate([np.partition(near, NEAREST, axis=1)[:, NEAREST] for _, near in _distances(side, side, block)])
        for side in (real, fake)
    )
    balls_M = np.zeros(len(fake), np.int64)
    reached = covered = 0
    for rows, between_nM in _distances(real, fake, block):
        inside_nM = between_nM < radius_N[rows, None]
        balls_M += inside_nM.sum(axis=0)
        covered += int(inside_nM.any(axis=1).sum())
        reached += int((between_nM < radius_M).any(axis=1).sum())
    return {
        "precision": float((balls_M > 0).mean()),
        "recall": reached / len(real),
        "density": float(balls_M.mean()) / NEAREST,
        "coverage": covered / len(real),
    }


def _distances(a_NF: np.ndarray, b_MF: np.ndarray, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of ``a``, their squared distances to all of ``b``); an image's to itself, where both are one, is zero."""
    own_N, own_M = (np.einsum("nf,nf->n", side, side) for side in (a_NF, b_MF))
    for start in range(0, len(a_NF), block):
        rows = slice(start, start + block)
        found = own_N[rows, None] + own_M - 2 * (a_NF[rows] @ b_MF.T)
        if a_NF is b_MF:
            found[np.arange(len(found)), start + np.arange(len(found))] = 0
        yield rows, found


def manifold_scores_of_grams(grams: Grams) -> dict[str, float]:
    """The same from inner products: what ``prdc`` computes, without its second pass over the features."""
    real_NN, fake_MM, between_NM = grams.squared_distances()
    radius_N = np.partition(real_NN, NEAREST, axis=1)[:, NEAREST]  # the first is the image itself
    radius_M = np.partition(fake_MM, NEAREST, axis=1)[:, NEAREST]
    inside_NM = between_NM < radius_N[:, None]
    return {
        "precision": float(inside_NM.any(axis=0).mean()),
        "recall": float((between_NM < radius_M).any(axis=1).mean()),
        "density": float(inside_NM.sum(axis=0).mean()) / NEAREST,
        "coverage": float((between_NM.min(axis=1) < radius_N).mean()),
    }


def manifold_interval(name: str, value: float, deviation: float, n_real: int, n_fake: int) -> tuple[float, float]:
    """The 95 % interval of one of the four from its deviation over half samples.

    Precision is a share of the fakes, recall and coverage of the real images. Density is none, but where it is near 0 a
    fake lies in one ball or in none: its upper end is not below Wilson's for the share of such fakes, over k.
    """
    if name != "density":
        return share_interval(value, deviation, n_fake if name == "precision" else n_real)
    low, high = interval(value, deviation, lowest=0.0)
    inside = min(1.0, value * NEAREST)
    return low, max(high, wilson(round(inside * n_fake), n_fake)[1] / NEAREST)
