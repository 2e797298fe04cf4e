"""Which images a step sees: a pure function of (seed, step), so that there is no sampler state to save or to lose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retinar.engine.errors import InputError
from retinar.train.config import TrainConfig
from retinar.train.world import World

Indices = NDArray[np.int64]


class Order:
    """Endless shuffled passes over ``images``, each image with a view of ``views`` drawn anew every pass.

    Pass e's permutation and views depend on (seed, e) alone. Step s takes the s-th run of ``batch_size`` entries of the
    passes put one after another: within a pass nothing repeats or is left out, a batch may straddle two passes, and
    data sets smaller than a batch work. A process of a parallel run takes its rows of :meth:`batch`.
    """

    def __init__(self, images: int, batch_size: int, *, seed: int, views: int = 1) -> None:
        if images < 1:
            raise ValueError(f"Expected at least one image to train on, found {images}.")
        self.images, self.batch_size, self.seed, self.views = images, batch_size, seed, views
        self._pass: tuple[int, Indices, Indices] | None = None

    def batch(self, step: int) -> tuple[Indices, Indices]:
        """Image and view indices of step ``step`` (counted from 0), each int64 [batch_size]."""
        first = step * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        images, views = np.empty_like(positions), np.empty_like(positions)
        passes = positions // self.images
        for epoch in np.unique(passes):
            mine = passes == epoch
            order, drawn = self._epoch(int(epoch))
            images[mine] = order[positions[mine] % self.images]
            views[mine] = drawn[positions[mine] % self.images]
        return images, views

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        if self._pass is None or self._pass[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            order = generator.permutation(self.images).astype(np.int64)
            self._pass = (epoch, order, generator.integers(self.views, size=self.images, dtype=np.int64))
        return self._pass[1], self._pass[2]


def own_rows(config: TrainConfig, world: World) -> list[Indices]:
    """The rows of a batch that this process takes, for each part of a step; InputError when they do not come out even.

    A part is an even share of the batch, a process's rows an even share of each part: so the mean over the processes of
    mean losses and gradients is that of the batch.
    """
    parts, each = config.accumulation, config.batch_size // config.accumulation
    if each % world.size:
        raise InputError(
            f"Expected batch_size / accumulation to be a multiple of the {world.size} processes, found "
            f"{config.batch_size} / {parts}: set accumulation, or batch_size for a new run."
        )
    return list(np.arange(config.batch_size).reshape(parts, world.size, -1)[:, world.rank])
