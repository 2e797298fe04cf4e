"""Inner products of two feature sets: every metric of features is a function of them, and they can be indexed.

A resample of the images is then a choice of rows and columns; no feature is touched again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grams:
    """fp64 inner products ``rr`` [N, N] within the real side, ``ff`` [M, M] within the fake, ``rf`` [N, M] between."""

    rr: np.ndarray
    ff: np.ndarray
    rf: np.ndarray

    @classmethod
    def of(cls, real_NF: np.ndarray, fake_MF: np.ndarray) -> Grams:
        real, fake = np.asarray(real_NF, np.float64), np.asarray(fake_MF, np.float64)
        return cls(real @ real.T, fake @ fake.T, real @ fake.T)

    def at(self, real: np.ndarray, fake: np.ndarray) -> Grams:
        """Of the images with these numbers alone."""
        return Grams(self.rr[np.ix_(real, real)], self.ff[np.ix_(fake, fake)], self.rf[np.ix_(real, fake)])

    def squared_distances(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same three blocks as squared Euclidean distances, an image's to itself exactly zero."""
        real, fake = np.diag(self.rr), np.diag(self.ff)
        rr = real[:, None] + real - 2 * self.rr
        ff = fake[:, None] + fake - 2 * self.ff
        np.fill_diagonal(rr, 0)
        np.fill_diagonal(ff, 0)
        return rr, ff, real[:, None] + fake - 2 * self.rf
