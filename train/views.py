"""Views of a photograph that are encoded beside each other: the image and its mirror, or ten crops.

Geometry and filters are those of LlamaGen's extraction (ADM's centre crop, torchvision's TenCrop), to the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retinar.engine.errors import InputError

Kind = Literal["mirror", "ten-crop"]
Pixels = NDArray[np.uint8]

_PLACES = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
_NAMES = {
    "mirror": ("image", "mirror"),
    "ten-crop": (*_PLACES, *(f"{place} of the mirror" for place in _PLACES)),
}


@dataclass(frozen=True)
class Views:
    """Squares of ``size`` pixels: the centre crop and its mirror ("mirror"), or from a centre crop of
    int(size * ``crop_range``) pixels the corners and the centre, of it and of its mirror ("ten-crop").
    """

    kind: Kind
    size: int
    crop_range: float = 1.1

    def __post_init__(self) -> None:
        if not 1 <= self.crop_range <= 16:
            raise InputError(f"Expected a crop range from 1 to 16, found {self.crop_range}: upstream's is 1.1.")

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each view, in order."""
        return _NAMES[self.kind]

    @property
    def side(self) -> int:
        """Pixels of the centre crop; photographs with a shorter side are enlarged to it."""
        return int(self.size * self.crop_range) if self.kind == "ten-crop" else self.size

    def of(self, pixels_HWC: Pixels) -> Pixels:
        """A photograph uint8 [H, W, 3] of any size -> its views uint8 [views, size, size, 3]."""
        square_SSC = center_crop(pixels_HWC, self.side)
        if self.kind == "mirror":
            return np.stack([square_SSC, square_SSC[:, ::-1]])
        return np.stack([crop for turned in (square_SSC, square_SSC[:, ::-1]) for crop in self._five(turned)])

    def _five(self, square_SSC: Pixels) -> list[Pixels]:
        # An odd margin is not split alike on both sides: crops are taken from the mirror, not mirrored.
        far, middle = self.side - self.size, round((self.side - self.size) / 2)
        corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
        return [square_SSC[top : top + self.size, left : left + self.size] for top, left in corners]


def center_crop(pixels_HWC: Pixels, size: int) -> Pixels:
    """The centred square of uint8 [H, W, 3], its shorter side resized to ``size`` pixels before."""
    pixels_HWC = resize_shorter(pixels_HWC, size)
    top, left = ((side - size) // 2 for side in pixels_HWC.shape[:2])
    return pixels_HWC[top : top + size, left : left + size]


def resize_shorter(pixels_HWC: Pixels, size: int) -> Pixels:
    """uint8 [H, W, 3] with a shorter side of ``size`` pixels: halved by averages while twice as large, then bicubic."""
    image = Image.fromarray(pixels_HWC)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    return np.array(image.resize(shape, Image.Resampling.BICUBIC))
