"""Procedural fundus phantoms in OIA-DDR's layout: photographs for demos and tests that belong to nobody.

A phantom has a round field of view, a vignetted orange-red ground with choroidal texture, an optic disc, a branching
vessel tree and a macula; of class npdr it also has the lesions of its grade (microaneurysms, haemorrhages, hard
exudates, cotton-wool spots). They look like fundus photographs and are no model of any disease: never mix them with
real ones.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from retinar.engine.errors import InputError
from retinar.engine.files import write_json, write_text
from retinar.engine.progress import Progress, plain
from retinar.train.data.listing import SPLITS
from retinar.train.data.vessels import Anatomy, Segment, grow

CLASSES = ("healthy", "npdr")
MARKER = "phantoms.json"

_OVERSAMPLE = 4  # shapes are drawn this much larger and averaged: smooth edges
_QUALITY = 92

Plane = npt.NDArray[np.float32]  # [size, size], 0 to 1


def write_phantoms(
    out: Path | str,
    counts: Mapping[str, Mapping[str, int]],
    *,
    seed: int = 0,
    size: int = 256,
    progress: Progress = plain,
) -> dict[str, object]:
    """Draw ``counts[split][class]`` phantoms into ``out`` as OIA-DDR publishes: {split}/*.jpg and {split}.txt.

    Each depends on (seed, split, class, its number) alone. A folder that already holds the same phantoms is left as
    it is; any other content is an InputError. Returns {"out", "counts", "seed", "size", "reused"}.
    """
    out = Path(out)
    for split, classes in counts.items():
        if split not in SPLITS or any(name not in CLASSES or count < 0 for name, count in classes.items()):
            raise InputError(f"expected counts by train, valid, test and healthy, npdr, got {split}: {dict(classes)}")
    if not 32 <= size <= 1024:
        raise InputError(f"expected phantoms of 32 to 1024 pixels, got {size}")
    if seed < 0:
        raise InputError(f"expected a seed of 0 or more, got {seed}")
    wanted = {"seed": seed, "size": size, "counts": {split: dict(classes) for split, classes in counts.items()}}
    summary: dict[str, object] = {"out": str(out), **wanted}
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise InputError(f"expected an empty folder for phantoms, {out} holds something else: choose another one")
        if _read_marker(out / MARKER) == {**wanted, "complete": True}:
            return {**summary, "reused": True}
        for old in [*out.glob("*/phantom-*.jpg"), *out.glob("*.txt")]:
            old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {**wanted, "complete": False})
    with progress("drawing phantoms", sum(sum(classes.values()) for classes in counts.values())) as bar:
        for split, classes in counts.items():
            (out / split).mkdir(exist_ok=True)
            lines = []
            for label, count in classes.items():
                for index in range(count):
                    phantom = draw_phantom(label, index, split=split, seed=seed, size=size)
                    name = f"phantom-{split}-{label}-{index:05d}_{phantom.eye}.jpg"
                    buffer = io.BytesIO()
                    phantom.image.save(buffer, "JPEG", quality=_QUALITY)
                    (out / split / name).write_bytes(buffer.getvalue())
                    lines.append(f"{name} {phantom.grade}\n")
                    bar.advance()
            write_text(out / f"{split}.txt", "".join(lines))
    write_json(out / MARKER, {**wanted, "complete": True})
    return {**summary, "reused": False}


def _read_marker(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


class Phantom(NamedTuple):
    """One phantom: RGB image, grade (0, 2 or 3), eye ("left" or "right")."""

    image: Image.Image
    grade: int
    eye: str


def draw_phantom(label: str, index: int, *, split: str = "train", seed: int = 0, size: int = 256) -> Phantom:
    """Draw one phantom of class ``label``."""
    entropy = (seed, SPLITS.index(split), CLASSES.index(label), index)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    grade = 0 if label == "healthy" else int(rng.choice((2, 3), p=(0.65, 0.35)))
    side = 1 if rng.random() < 0.5 else -1
    centre_x = 0.5 + side * rng.uniform(0.0, 0.07)  # the field is centred between disc and macula, or nearer the macula
    level = 0.5 + rng.normal(0, 0.015)
    tilt = rng.normal(0, 0.012)
    anatomy = Anatomy(
        side,
        (centre_x + side * rng.uniform(0.2, 0.235), level - 0.012 + tilt),
        rng.uniform(0.06, 0.074),
        (centre_x - side * rng.uniform(0.125, 0.155), level + 0.025 - tilt),
    )
    segments = grow(anatomy, rng)
    scene = _Scene(size, anatomy, rng)
    scene.ground()
    scene.macula()
    scene.disc()
    scene.vessels(segments)
    if grade:
        scene.lesions(segments, grade)
    return Phantom(scene.finish(), grade, "right" if side > 0 else "left")


class _Scene:
    """A picture under construction: linear RGB planes, painted back to front."""

    def __init__(self, size: int, anatomy: Anatomy, rng: np.random.Generator) -> None:
        self.size, self.anatomy, self.rng = size, anatomy, rng
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = axis[None, :], axis[:, None]
        self.pixels = np.empty((size, size, 3), dtype=np.float32)

    # -- painting

    def noise(self, cells: int, stretch: float = 1.0) -> Plane:
        """Smooth noise, mean 0, deviation about 1, with features of 1/cells of the side."""
        coarse = self.rng.standard_normal((cells, max(2, int(cells * stretch)))).astype(np.float32)
        image = Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.float32) * np.float32(1.4)

    def blob(self, centre: tuple[float, float], rx: float, ry: float) -> Plane:
        """A Gaussian of height 1."""
        exponent = -0.5 * (((self.x - centre[0]) / rx) ** 2 + ((self.y - centre[1]) / ry) ** 2)
        return np.asarray(np.exp(exponent), dtype=np.float32)

    def mix(self, mask: Plane, colour: tuple[float, float, float]) -> None:
        """Cover with a colour where the mask is 1."""
        self.pixels += mask[..., None] * (np.array(colour, dtype=np.float32) - self.pixels)

    def absorb(self, mask: Plane, transmission: tuple[float, float, float]) -> None:
        """Multiply with a transmission where the mask is 1 (blood, pigment)."""
        self.pixels *= 1 - mask[..., None] * (1 - np.array(transmission, dtype=np.float32))

    def canvas(self) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
        side = self.size * _OVERSAMPLE
        image = Image.new("L", (side, side))
        return image, ImageDraw.Draw(image), side

    def shrink(self, canvas: Image.Image, blur: float = 0.0) -> Plane:
        """Average a canvas to the picture's size; ``blur`` in fractions of the side."""
        image = canvas.reduce(_OVERSAMPLE)
        if blur * self.size > 0.2:
            image = image.filter(ImageFilter.GaussianBlur(blur * self.size))
        return np.asarray(image, dtype=np.float32) / np.float32(255)

    # -- anatomy

    def ground(self) -> None:
        """Pigment epithelium and choroid: one hue per eye, uneven light, cloudy and streaky texture."""
        rng = self.rng
        red = rng.uniform(0.6, 0.82)
        green, blue = red * rng.uniform(0.4, 0.54), red * rng.uniform(0.15, 0.3)
        shade = 0.035 * self.noise(5) + 0.025 * self.noise(14)
        streaks = rng.uniform(0.01, 0.035) * self.noise(44, stretch=0.35) + 0.012 * self.noise(70)
        for channel, (base, texture) in enumerate(((red, 0.7), (green, 1.5), (blue, 1.0))):
            self.pixels[..., channel] = base * (1 + shade + texture * streaks)
        light = rng.uniform(-0.12, 0.12, 2)
        tilt = 1 + light[0] * (self.x - 0.5) * 2 + light[1] * (self.y - 0.5) * 2
        radius = np.hypot(self.x - 0.5, self.y - 0.5) / 0.5
        self.pixels *= (tilt * (1.08 - rng.uniform(0.28, 0.5) * radius**2.4))[..., None]
        # Nerve fibres around the disc reflect.
        dx, dy = self.anatomy.disc
        self.pixels *= 1 + self.blob((dx, dy), 0.13, 0.17)[..., None] * np.array((0.16, 0.3, 0.25), dtype=np.float32)

    def macula(self) -> None:
        fovea, radius = self.anatomy.fovea, self.rng.uniform(0.045, 0.06)
        self.absorb(0.75 * self.blob(fovea, radius * 1.6, radius * 1.5), (0.8, 0.66, 0.6))
        self.absorb(0.8 * self.blob(fovea, radius * 0.65, radius * 0.6), (0.72, 0.6, 0.6))
        if self.rng.random() < 0.5:
            self.mix(0.16 * self.blob(fovea, 0.006, 0.006), (1.0, 0.8, 0.6))

    def disc(self) -> None:
        """A bright, slightly upright ellipse with a paler cup."""
        (cx, cy), r, rng = self.anatomy.disc, self.anatomy.disc_radius, self.rng
        bright = rng.uniform(0.86, 1.0)
        distance = np.hypot((self.x - cx) / r, (self.y - cy) / (r * rng.uniform(1.05, 1.16)))
        rim = np.clip((1.06 - distance) / 0.22, 0, 1)
        self.mix((0.9 * rim).astype(np.float32), (0.98 * bright, 0.76 * bright, 0.44 * bright))
        cup = rng.uniform(0.3, 0.5)
        inner = np.hypot((self.x - cx + self.anatomy.side * 0.12 * r) / r, (self.y - cy) / r)
        pale = (0.8 * np.clip((cup + 0.2 - inner) / 0.3, 0, 1)).astype(np.float32)
        self.mix(pale, (1.0 * bright, 0.92 * bright, 0.72 * bright))

    def vessels(self, segments: list[Segment]) -> None:
        """Veins first, arteries above them, a light reflex along the wide arteries."""
        for artery, transmission in ((False, (0.6, 0.36, 0.42)), (True, (0.82, 0.5, 0.5))):
            canvas, draw, side = self.canvas()
            reflex, light, _ = self.canvas()
            for s in segments:
                if s.artery is artery:
                    line = (s.x0 * side, s.y0 * side, s.x1 * side, s.y1 * side)
                    width = max(s.width * side, 1.0)
                    # Narrower than two fine pixels: fainter instead of thinner.
                    draw.line(line, fill=int(255 * min(1.0, 0.35 + s.width / 0.006)), width=round(width))
                    if width > 5:
                        h = width / 2
                        draw.ellipse((line[2] - h, line[3] - h, line[2] + h, line[3] + h), fill=255)
                        light.line(line, fill=255, width=max(1, round(width * 0.28)))
            self.absorb(self.shrink(canvas, 0.0012), transmission)
            self.mix((0.3 if artery else 0.1) * self.shrink(reflex, 0.001), (0.95, 0.6, 0.42))

    # -- disease

    def lesions(self, segments: list[Segment], grade: int) -> None:
        """Cotton-wool spots, exudates, haemorrhages, microaneurysms; more of each for grade 3."""
        rng = self.rng
        severe = grade == 3
        canvas, draw, side = self.canvas()
        for _ in range(rng.integers(1, 4) if severe else rng.integers(0, 2)):
            self.splotch(draw, side, self.place(0.16), rng.uniform(0.018, 0.03), 7)
        self.mix(0.75 * self.shrink(canvas, 0.007), (0.98, 0.88, 0.66))

        canvas, draw, side = self.canvas()
        for _ in range(rng.integers(4, 7) if severe else rng.integers(3, 5)):
            self.exudates(draw, side)
        self.mix(0.95 * self.shrink(canvas, 0.001), (1.0, 0.92, 0.42))

        canvas, draw, side = self.canvas()
        for _ in range(rng.integers(14, 24) if severe else rng.integers(6, 11)):
            if rng.random() < 0.3:  # flame: along the nerve fibres, that is roughly along a vessel
                near = segments[int(rng.integers(len(segments)))]
                self.flame(draw, side, near)
            else:
                self.splotch(draw, side, self.place(0.1), rng.uniform(0.009, 0.02), 4)
        self.absorb(0.95 * self.shrink(canvas, 0.002), (0.52, 0.2, 0.22))

        canvas, draw, side = self.canvas()
        for _ in range(rng.integers(18, 34) if severe else rng.integers(9, 18)):
            x, y = self.place(0.05)
            r = rng.uniform(0.0035, 0.0065) * side
            draw.ellipse((x * side - r, y * side - r, x * side + r, y * side + r), fill=255)
        self.absorb(0.9 * self.shrink(canvas, 0.0012), (0.6, 0.26, 0.3))

    def place(self, clear: float) -> tuple[float, float]:
        """A point inside the field, off the disc, at least ``clear`` from the fovea."""
        while True:
            radius, angle = 0.43 * math.sqrt(self.rng.random()), self.rng.uniform(0, 2 * math.pi)
            x, y = 0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)
            dx, dy = self.anatomy.disc
            fx, fy = self.anatomy.fovea
            if math.hypot(x - dx, y - dy) > 2 * self.anatomy.disc_radius and math.hypot(x - fx, y - fy) > clear:
                return x, y

    def splotch(
        self, draw: ImageDraw.ImageDraw, side: int, centre: tuple[float, float], radius: float, parts: int
    ) -> None:
        """An irregular patch: a few overlapping ellipses."""
        for _ in range(parts):
            x, y = (c + self.rng.normal(0, 0.45 * radius) for c in centre)
            rx, ry = radius * self.rng.uniform(0.5, 0.9, 2)
            draw.ellipse(((x - rx) * side, (y - ry) * side, (x + rx) * side, (y + ry) * side), fill=255)

    def flame(self, draw: ImageDraw.ImageDraw, side: int, near: Segment) -> None:
        angle = math.atan2(near.y1 - near.y0, near.x1 - near.x0)
        x, y = near.x0 + self.rng.normal(0, 0.012), near.y0 + self.rng.normal(0, 0.012)
        for _ in range(4):
            tilt, half = angle + self.rng.normal(0, 0.22), self.rng.uniform(0.012, 0.026)
            ends = (
                x - half * math.cos(tilt),
                y - half * math.sin(tilt),
                x + half * math.cos(tilt),
                y + half * math.sin(tilt),
            )
            draw.line([end * side for end in ends], fill=255, width=round(0.006 * side))

    def exudates(self, draw: ImageDraw.ImageDraw, side: int) -> None:
        """A cluster of small sharp yellow deposits, some in a ring (circinate), more of them near the macula."""
        rng = self.rng
        cx, cy = self.place(0.07)
        fx, fy = self.anatomy.fovea
        pull = rng.uniform(0.0, 0.5)
        cx, cy = cx + pull * (fx - cx), cy + pull * (fy - cy)
        ring, spread = rng.random() < 0.4, rng.uniform(0.025, 0.05)
        for _ in range(int(rng.integers(14, 30))):
            angle = rng.uniform(0, 2 * math.pi)
            reach = spread * (rng.normal(1, 0.15) if ring else abs(rng.normal(0, 0.6)))
            x, y = cx + reach * math.cos(angle), cy + reach * math.sin(angle)
            r = rng.uniform(0.0035, 0.0105) * rng.uniform(0.7, 1.0)
            draw.ellipse(((x - r) * side, (y - 0.85 * r) * side, (x + r) * side, (y + 0.85 * r) * side), fill=255)

    # -- camera

    def finish(self) -> Image.Image:
        """The round field (sometimes cut at top and bottom), colour cast, sensor noise."""
        rng = self.rng
        canvas, draw, side = self.canvas()
        radius = rng.uniform(0.475, 0.495) if rng.random() < 0.75 else rng.uniform(0.5, 0.54)
        draw.ellipse(
            ((0.5 - radius) * side, (0.5 - radius) * side, (0.5 + radius) * side, (0.5 + radius) * side), fill=255
        )
        field = self.shrink(canvas, 0.002)[..., None]
        cast = rng.uniform(0.93, 1.07, 3).astype(np.float32) * np.float32(rng.uniform(0.85, 1.1))
        grain = rng.standard_normal(self.pixels.shape, dtype=np.float32) * np.float32(rng.uniform(0.006, 0.012))
        pixels = np.clip(self.pixels * cast + grain, 0, 1) * field + np.float32(0.008)
        return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
