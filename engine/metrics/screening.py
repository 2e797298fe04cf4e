"""Which readable images of a folder are scored: grey ones among colour and wrong sizes are named and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retinar.engine.metrics.folders import read_image

GREY = "greyscale, not a colour photograph"
SIZE = "wrong size"
SHORTEST = 0.5
"""An image whose short side is below this share of the folder's median is of another kind (a thumbnail, an icon)."""
LONGEST = 2.0
"""Neither a photograph of an eye nor a generated image is longer than this many times its short side."""
NAMED = 5


@dataclass(frozen=True)
class Look:
    """What :func:`screen` knows of an image: its size in pixels, and whether its three channels are the same."""

    width: int
    height: int
    grey: bool

    @classmethod
    def of(cls, pixels: np.ndarray) -> Look:
        """Of uint8 RGB [H, W, 3]. Single-channel files are grey after their conversion to RGB, whatever their mode."""
        first, second, third = (pixels[..., channel] for channel in range(3))
        return cls(pixels.shape[1], pixels.shape[0], bool((first == second).all() and (second == third).all()))

    @property
    def short(self) -> int:
        return min(self.width, self.height)

    @property
    def ratio(self) -> float:
        return max(self.width, self.height) / max(1, self.short)

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


@dataclass(frozen=True)
class Screened:
    """``left_out``: file -> reason, in the order of the files; ``warnings``: what is scored all the same."""

    left_out: dict[Path, str]
    warnings: list[str]


def screen(looks: Mapping[Path, Look], folder: Path | str) -> Screened:
    """Judge the images of one folder (all of its classes) by their company.

    Left out: grey images where any image has colour; images whose short side is under half of the folder's median; and
    images longer than 2:1, unless the median image is. A folder of grey images alone is scored with a warning. Sizes
    other than the most common one are scored, since every image is resized for the network, with a warning that names
    up to five.
    """
    left_out: dict[Path, str] = {}
    warnings: list[str] = []
    if all(look.grey for look in looks.values()):
        if looks:
            warnings.append(f"{folder} holds greyscale images only: they are scored as they are")
    else:
        left_out.update({path: GREY for path, look in looks.items() if look.grey})
    rest = {path: look for path, look in looks.items() if path not in left_out}
    if not rest:
        return Screened(left_out, warnings)
    short = float(np.median([look.short for look in rest.values()]))
    usual = float(np.median([look.ratio for look in rest.values()])) <= LONGEST
    for path, look in rest.items():
        if look.short < SHORTEST * short:
            left_out[path] = f"{SIZE}: {look}, where half of the folder has a short side of {short:.0f} or more"
        elif usual and look.ratio > LONGEST:
            left_out[path] = f"{SIZE}: {look}, longer than {LONGEST:g}:1"
    sizes = Counter((look.width, look.height) for path, look in rest.items() if path not in left_out)
    if len(sizes) > 1:
        (width, height), count = sizes.most_common(1)[0]
        others = [
            f"{path.name} ({look})"
            for path, look in rest.items()
            if path not in left_out and (look.width, look.height) != (width, height)
        ]
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        warnings.append(
            f"{len(others)} of {sizes.total()} images in {folder} are not {width} x {height} as the other {count} are, "
            f"and are scored resized: {', '.join(others[:NAMED])}{more}"
        )
    return Screened({path: left_out[path] for path in looks if path in left_out}, warnings)


def usable(
    classes: Mapping[str, Sequence[Path]], folder: Path | str, skipped: dict[Path, str] | None = None
) -> dict[str, tuple[Path, ...]]:
    """The files of each class of one folder that can be read and are not left out by :func:`screen`.

    The others are put into ``skipped`` with their reasons.
    """
    looks: dict[Path, Look] = {}
    unread: dict[Path, str] = {}
    for path in (path for files in classes.values() for path in files):
        try:
            looks[path] = Look.of(read_image(path))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            unread[path] = str(error) or type(error).__name__
    left_out = screen(looks, folder).left_out
    if skipped is not None:
        skipped.update(unread | left_out)
    return {
        label: tuple(path for path in files if path in looks and path not in left_out)
        for label, files in classes.items()
    }
