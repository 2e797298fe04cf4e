"""The kernel distance between two sets of features (KID, Binkowski et al. 2018).

The unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x y / F + 1)^3, F the number of features: the
mean of k over pairs of different real images, plus that over pairs of different fakes, less twice that over pairs of
one real and one fake. It is unbiased at every count, so it may fall below zero.

clean-fid averages the same formula over 100 random subsets of min(N, M, 1000) images a side. With N = M <= 1000 every
subset is everything and the two are equal (1e-7, clean-fid's fp32). Elsewhere its figure depends on NumPy's global
random state. The value here is the mean over every subset that it could draw, so no other is nearer to all of its
seeds: 100 photographs against 150 others give it a standard deviation of 5e-5 over seeds around 0.001, and 100 against
150 far worse images 2e-4 around 0.15.
"""

from __future__ import annotations

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.grams import Grams

BLOCK = 2048


def kernel_distance(real_NF: np.ndarray, fake_MF: np.ndarray) -> float:
    """KID of two feature sets (at least two rows each, any real dtype; computed in fp64)."""
    if min(len(real_NF), len(fake_MF)) < 2:
        raise InputError(
            f"Expected at least 2 images on each side for KID, found {len(real_NF)} and {len(fake_MF)}: add images."
        )
    real, fake = np.asarray(real_NF, np.float64), np.asarray(fake_MF, np.float64)
    return _unbiased(_sum(real, real), _sum(fake, fake), _sum(real, fake), _own(real), _own(fake), len(real), len(fake))


def kernel_distance_of_grams(grams: Grams, features: int) -> float:
    """KID from inner products of vectors of so many ``features``."""
    rr, ff, rf = (_kernel(block, features) for block in (grams.rr, grams.ff, grams.rf))
    return _unbiased(rr.sum(), ff.sum(), rf.sum(), np.trace(rr), np.trace(ff), len(rr), len(ff))


def _unbiased(rr: float, ff: float, rf: float, own_real: float, own_fake: float, n: int, m: int) -> float:
    return float((rr - own_real) / (n * (n - 1)) + (ff - own_fake) / (m * (m - 1)) - 2 * rf / (n * m))


def _kernel(products: np.ndarray, features: int) -> np.ndarray:
    shifted = products / features + 1
    return shifted * shifted * shifted  # a third of the time of ** 3


def _own(rows_NF: np.ndarray) -> float:
    return float(_kernel(np.einsum("nf,nf->n", rows_NF, rows_NF), rows_NF.shape[1]).sum())


def _sum(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    """Of k over all pairs, in blocks: fifty thousand images would have a matrix of 20 GB."""
    starts = [(i, j) for i in range(0, len(a_NF), BLOCK) for j in range(0, len(b_MF), BLOCK)]
    parts = (_kernel(a_NF[i : i + BLOCK] @ b_MF[j : j + BLOCK].T, a_NF.shape[1]).sum() for i, j in starts)
    return float(sum(parts))
