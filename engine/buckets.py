"""The sizes of batches that steps are prepared for, and which of them some requests will need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from retinar.engine.config import GPTConfig
from retinar.engine.request import Request
from retinar.engine.scheduler import Scheduler

#: Rows that the op ``linear`` multiplies together: padding within a block is free, so above it buckets are blocks.
BLOCK = 64


class Bucket(NamedTuple):
    """The sizes of a padded step."""

    images: int
    rows: int


def sizes(most: int) -> list[int]:
    """Powers of two up to a block, then whole blocks; the last is ``most``."""
    found = [1 << power for power in range(BLOCK.bit_length()) if 1 << power < most]
    return [*found, *range(2 * BLOCK, most, BLOCK), most]


def bucket_of(images: int, rows: int, max_images: int) -> Bucket:
    """The smallest bucket that holds a step, where at most ``max_images`` live."""
    return Bucket(
        next(size for size in sizes(max_images) if size >= images),
        next(size for size in sizes(2 * max_images) if size >= rows),
    )


def buckets_of(
    requests: Iterable[Request], config: GPTConfig, *, page_size: int, pages: int, max_images: int, most: int
) -> set[Bucket]:
    """The buckets that these requests, submitted together, go through: the scheduler knows before any step is run.

    ``most``: images that the runner has room for, at least ``max_images``.
    """
    scheduler = Scheduler(config.block_size, page_size, pages, max_images)
    for request in requests:
        scheduler.submit(request)
    found = set()
    while scheduler.busy:
        scheduler.admit()
        guided = sum(image.guided for image in scheduler.live)
        found.add(bucket_of(len(scheduler.live), len(scheduler.live) + guided, most))
        scheduler.advance(scheduler.quiet)
    return found
