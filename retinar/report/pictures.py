"""Pictures inside a page: small copies as data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from retinar.engine.metrics.evaluation import ALL
from retinar.engine.metrics.folders import ImageFolder, read_image, thin
from retinar.engine.metrics.reconstruction import fit, reconstruct

SIDE, QUALITY = 200, 86
CLASSES = 8
"""Classes of which images are shown; every class is in the tables."""
TILES = 96
"""Images of real and generated classes together."""
RECONSTRUCTED, PAIRS, COMPARED = 6, 12, 4


@dataclass(frozen=True)
class Picture:
    """An image for the page; ``src`` is a data URI, ``alt`` says what is to be seen."""

    src: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Pair:
    """Two pictures that belong together, with a line below them."""

    first: Picture
    second: Picture
    caption: str
    flagged: bool = False


@dataclass(frozen=True)
class Shelf:
    """Pictures of one class from one side; ``total`` counts what lies in its folder."""

    label: str
    total: int
    images: tuple[Image.Image, ...]
    pictures: tuple[Picture, ...]


def data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(image: Image.Image, alt: str, side: int = SIDE) -> Picture:
    """A copy of at most ``side`` pixels as JPEG, without any of the file's metadata."""
    small = Image.fromarray(np.asarray(image.convert("RGB")))
    if max(small.size) > side:
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return Picture(data_uri("jpeg", buffer.getvalue()), *small.size, alt)


def readable(files: Iterable[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """The files that can be read, as RGB; the others were named by the evaluation."""
    for path in files:
        try:
            yield path, Image.fromarray(read_image(path))
        except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            continue


def by_class(folder: ImageFolder, labels: Sequence[str], left_out: Container[str] = ()) -> dict[str, tuple[Path, ...]]:
    """Files of the classes in the report; of the folder as a whole where it was scored so. None of ``left_out``."""
    classes = {label: folder.classes[label] for label in labels if label in folder.classes} or {ALL: folder.files}
    return {label: tuple(path for path in files if str(path) not in left_out) for label, files in classes.items()}


def shelves(classes: Mapping[str, Sequence[Path]], kind: str) -> list[Shelf]:
    """Images of each class, evenly spaced over its files."""
    shown = list(classes)[:CLASSES]
    each = max(6, min(24, TILES // (2 * max(1, len(shown)))))
    found = []
    for label in shown:
        pairs = list(readable(thin(tuple(classes[label]), each)))
        alts = [f"{kind}{_of(label)}: {path.name}" for path, _ in pairs]
        pictures = tuple(picture(image, alt) for (_, image), alt in zip(pairs, alts, strict=True))
        found.append(Shelf(label, len(classes[label]), tuple(image for _, image in pairs), pictures))
    return found


def reconstructions(
    classes: Mapping[str, Sequence[Path]], tokenizer: Any
) -> list[tuple[str, list[tuple[Image.Image, Image.Image]]]]:
    """(label, [(what the tokenizer was given, what it gave back)]) of some images of each class."""
    size, found = tokenizer.config.image_size, []
    for label, files in list(classes.items())[:CLASSES]:
        images = [fit(np.asarray(image), size) for _, image in readable(thin(tuple(files), RECONSTRUCTED))]
        if images:
            decoded, _ = reconstruct(tokenizer, np.stack(images))
            pairs = [(Image.fromarray(a), Image.fromarray(b)) for a, b in zip(images, decoded, strict=True)]
            found.append((label, pairs))
    return found


def reconstruction_pairs(label: str, pairs: Iterable[tuple[Image.Image, Image.Image]]) -> list[Pair]:
    return [
        Pair(
            picture(original, f"Photograph{_of(label)}, number {number}"),
            picture(decoded, f"The same{_of(label)}, number {number}, through the tokenizer"),
            "",
        )
        for number, (original, decoded) in enumerate(pairs, 1)
    ]


def closest_pairs(
    rows: Iterable[Mapping[str, Any]], most: int = PAIRS, kind: str = "Generated"
) -> list[tuple[Mapping[str, Any], Pair]]:
    """Images beside their nearest training photographs (mirrored where that lies nearer), with the row of each pair.

    Pairs whose files cannot be read any more are passed over.
    """
    found: list[tuple[Mapping[str, Any], Pair]] = []
    for row in rows:
        if len(found) == most:
            break
        both = list(readable([Path(row["generated"]), Path(row["train"])]))
        if len(both) < 2:
            continue
        (image, first), (train, second) = both
        mirrored = bool(row.get("mirrored"))
        distances = [f"{name} {row[key]:.3g}" for key, name in _DISTANCES.items() if row.get(key) is not None]
        pair = Pair(
            picture(first, f"{kind}: {_named(image)}"),
            picture(
                ImageOps.mirror(second) if mirrored else second,
                f"Its nearest training photograph: {_named(train)}{', mirrored' if mirrored else ''}",
            ),
            ", ".join([*distances, *(["mirrored"] if mirrored else [])]),
            bool(row.get("flagged")),
        )
        found.append((row, pair))
    return found


_DISTANCES = {"inception": "Inception", "lpips": "LPIPS", "structure": "structure"}


def _named(path: Path) -> str:
    """With its folder, which is its class."""
    return f"{path.parent.name}/{path.name}"


def _of(label: str) -> str:
    return "" if label == ALL else f", {label}"
