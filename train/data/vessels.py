"""The vessel tree of a fundus phantom: arcades around the macula, branching, tapering, tortuous.

Coordinates are fractions of the image side, y downwards. A tree is a list of short segments to draw.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_STEP = 0.011  # length of a segment
_SMALLEST = 0.0016  # vessels end at this width: less than half a pixel at 256


class Segment(NamedTuple):
    """A straight piece of a vessel."""

    x0: float
    y0: float
    x1: float
    y1: float
    width: float
    artery: bool


class Anatomy(NamedTuple):
    """Where things are; ``side`` is +1 when the disc is on the right (a right eye), -1 on the left."""

    side: int
    disc: tuple[float, float]
    disc_radius: float
    fovea: tuple[float, float]


# Main vessels: direction at the disc in degrees from nasal (0) over up (90) to temporal (180); relative width.
_MAINS = ((100, 1.0), (-100, 1.0), (62, 0.72), (-62, 0.72), (25, 0.42), (-28, 0.42), (165, 0.3), (-163, 0.3))


def grow(anatomy: Anatomy, rng: np.random.Generator) -> list[Segment]:
    """A tree of some 1,000 segments."""
    segments: list[Segment] = []
    scale = rng.uniform(0.85, 1.15)
    height = float(rng.uniform(0.23, 0.3))
    for degrees, share in _MAINS:
        for artery in (False, True):
            if share < 0.35 and rng.random() < 0.6:  # small vessels to the macula are not in every eye
                continue
            angle = math.radians(degrees + (9 if artery else -3) + rng.normal(0, 6))
            # Veins are wider than arteries (about 3 : 2).
            width = 0.0148 * scale * share * (0.68 if artery else 1.0) * rng.uniform(0.9, 1.1)
            start = anatomy.disc_radius * rng.uniform(0.05, 0.3)
            x = anatomy.disc[0] + anatomy.side * start * math.cos(angle)
            y = anatomy.disc[1] - start * math.sin(angle)
            heading = math.atan2(-math.sin(angle), anatomy.side * math.cos(angle))
            arcade = abs(degrees) > 90 and share > 0.5
            _walk(segments, anatomy, rng, x, y, heading, width, artery, height if arcade else 0.0, depth=0)
    return segments


def _walk(
    segments: list[Segment],
    anatomy: Anatomy,
    rng: np.random.Generator,
    x: float,
    y: float,
    heading: float,
    width: float,
    artery: bool,
    arcade: float,
    depth: int,
) -> None:
    """Follow one vessel to the rim, or until it is too thin; branch on the way.

    ``arcade`` is the distance from the fovea that an arcade keeps; 0 for other vessels.
    """
    fx, fy = anatomy.fovea
    above = y < anatomy.disc[1] if abs(y - anatomy.disc[1]) > 1e-6 else heading < 0
    wander = rng.normal(0, 1, 160)
    chance = rng.random(160)
    drift, since, turn = 0.0, 0, 1 if rng.random() < 0.5 else -1
    for i in range(160):
        drift = 0.86 * drift + (0.085 if artery else 0.07) * float(wander[i])
        if arcade and anatomy.side * (fx - x) < 0.35 * arcade:
            # Around the fovea at a distance: follow the tangent, tilted outwards until the arcade is wide enough. Past
            # the fovea it goes on as it likes: arcades do not close.
            distance = math.hypot(x - fx, y - fy)
            radial = math.atan2(y - fy, x - fx)
            around = -anatomy.side if above else anatomy.side
            outward = min(max(2.2 * (arcade - distance), -0.5), 0.6)
            heading += 0.13 * _wrap(radial + around * (math.pi / 2 - outward) - heading)
        heading += 0.16 * drift
        nx, ny = x + _STEP * math.cos(heading), y + _STEP * math.sin(heading)
        segments.append(Segment(x, y, nx, ny, width, artery))
        x, y = nx, ny
        width *= 0.986 if depth == 0 else 0.977
        since += 1
        if width < _SMALLEST or math.hypot(x - 0.5, y - 0.5) > 0.56:
            return
        if depth and math.hypot(x - fx, y - fy) < 0.055:  # the fovea has no vessels
            return
        if depth < 3 and since > 4 and chance[i] < (0.16 if depth == 0 else 0.12):
            since, turn = 0, -turn
            branch = heading + turn * math.radians(rng.uniform(28, 62))
            share = rng.uniform(0.45, 0.72) if depth == 0 else rng.uniform(0.6, 0.8)
            _walk(segments, anatomy, rng, x, y, branch, width * share, artery, 0.0, depth + 1)
            width *= 0.95
            heading -= turn * 0.08


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi
