"""Does a model repeat its training photographs? The nearest training image of each generated one, and how near is near.

Every generated image is compared with every training image and its mirror image; so is every held-out photograph, which
cannot be a copy. What lies below the held-out photographs' 1 % quantile is flagged, and the share of flagged images is
set beside that 1 % (the logic of Meehan et al. 2020; Carlini et al. 2023, "Extracting Training Data from Diffusion
Models", look for the same near copies in diffusion models).

What the share can say: well above the quantile, it means copies, or images more like one training photograph than
another patient's eye would be. What it cannot say: that no patient can be recognised. Neither Inception's features nor
LPIPS were made to tell patients apart: photographs of one camera lie as close together as copies that were shifted or
compressed (by Inception, most copies at JPEG quality 75 pass for other eyes). Vessels do tell patients apart, so their
``structure`` is compared too, after alignment; yet an eye repeated in part or drawn anew may still lie as far off as
another eye, and a single true copy harms its patient however small the share. So training images that were compressed
anew are searched for as well, which says how sharp each measure is on these photographs, and the closest pairs are
there to be looked at (``pairs_sheet``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from retinar.engine.errors import InputError
from retinar.engine.metrics.copies import KINDS, changed, exact_copies
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.flags import (
    GENERATED,
    HELD_OUT,
    INCEPTION,
    LPIPS_NAME,
    STRUCTURE,
    TRAIN,
    Measure,
    PairOf,
    Side,
    distances_of,
    leaked,
    measures_of,
    pairs_of,
)
from retinar.engine.metrics.folders import ImageFolder, open_folder, read_image, thin
from retinar.engine.metrics.neighbours import LPIPS_SIZE, nearest_features, nearest_lpips
from retinar.engine.metrics.structure import nearest_structure
from retinar.engine.perceptual import LPIPS
from retinar.engine.progress import Progress, silent

COPIES = 32
"""Training images that are changed and searched for, of each kind."""
SHOWN = 24
"""Held-out pairs that are kept for comparison."""


@dataclass(frozen=True)
class OfClass:
    """The measures of one class, with thresholds from the held-out photographs of that class alone."""

    label: str
    measures: list[Measure]


@dataclass
class Memorisation:
    """Everything found; ``measures`` over all classes, ``classes`` one by one, ``pairs`` closest first.

    ``distances``: by measure and side ("generated", "held_out"), the distance of each image to its nearest.
    """

    train: str
    generated: str
    held_out: str
    counts: dict[str, int]
    quantile: float
    lpips_size: int | None
    exact_copies: int
    measures: list[Measure]
    classes: list[OfClass]
    pairs: list[PairOf]
    held_out_pairs: list[PairOf]
    distances: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    leaked: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    def measure(self, name: str = INCEPTION, label: str | None = None) -> Measure:
        of = self.measures if label is None else next(each.measures for each in self.classes if each.label == label)
        return next(each for each in of if each.measure == name)


def find_memorised(
    train: Path | str,
    generated: Path | str,
    held_out: Path | str,
    store: FeatureStore,
    lpips: LPIPS | None = None,
    *,
    limit: int | None = None,
    quantile: float = 0.01,
    seed: int = 0,
    copies: int = COPIES,
    lpips_size: int = LPIPS_SIZE,
    progress: Progress = silent,
) -> Memorisation:
    """Search the training images of all classes for each generated image and each held-out photograph.

    ``limit`` takes that many images a class of the generated and held-out ones, evenly spaced; training images are
    always searched as a whole. ``copies`` training images of each kind of ``copies.KINDS`` are searched for too (0:
    none). Without ``lpips`` that measure is left out. Held-out photographs that are training images (to the pixel, or
    of a structure that no two eyes share) are named in ``leaked`` and count nowhere. Raises InputError for missing
    folders, training images among the held-out files, and folders without a readable image.

    1,342 training, 800 generated and 800 held-out images take a busy core about nine minutes where the store has the
    features of the images as they are: five for those of the mirrored ones, two for VGG16, two for the comparisons.
    """
    if not 0 < quantile < 0.5:
        raise InputError(f"Expected a quantile between 0 and 0.5, found {quantile}: the default is 0.01.")
    folders = {TRAIN: open_folder(train), GENERATED: open_folder(generated), HELD_OUT: open_folder(held_out)}
    _check_apart(folders)
    skipped: dict[Path, str] = {}
    limits = {TRAIN: None, GENERATED: limit, HELD_OUT: limit}
    sides = {name: _read(folder, limits[name], name, store, skipped) for name, folder in folders.items()}
    known = sides.pop(TRAIN)
    width = _usual_width(sides[GENERATED].files)
    if copies > 0:
        sample, labels = thin(known.files, copies), np.array(thin(tuple(known.labels), copies), object)
        for kind in KINDS:
            sides[kind] = Side(known.root, sample, labels, store.of_arrays(changed(sample, kind, width)))
    _search(sides, known, width, store, lpips, lpips_size, progress)
    exact = exact_copies(sides[GENERATED].files + sides[HELD_OUT].files, known.files)
    out = leaked(sides[HELD_OUT], exact)
    leaks = [str(path) for path, is_out in zip(sides[HELD_OUT].files, out, strict=True) if is_out]
    sides[HELD_OUT] = sides[HELD_OUT][~out]
    if not len(sides[HELD_OUT].files):
        raise InputError(
            f"Expected photographs in {held_out} that are not in {train}, found training images alone: give others."
        )
    measures = measures_of(sides, quantile, seed)
    common = sorted(set(sides[GENERATED].labels) & set(sides[HELD_OUT].labels))
    classes = [
        OfClass(label, measures_of({name: side[side.labels == label] for name, side in sides.items()}, quantile, seed))
        for label in (common if len(common) > 1 else ())
    ]
    result = Memorisation(
        train=str(train),
        generated=str(generated),
        held_out=str(held_out),
        counts={TRAIN: len(known.files), **{name: len(sides[name].files) for name in (GENERATED, HELD_OUT)}},
        quantile=quantile,
        lpips_size=lpips_size if lpips is not None else None,
        exact_copies=sum(path in exact for path in sides[GENERATED].files),
        measures=measures,
        classes=classes,
        pairs=pairs_of(sides[GENERATED], known.files, measures, exact),
        held_out_pairs=pairs_of(sides[HELD_OUT], known.files, measures, exact)[:SHOWN],
        distances={
            name: {side: of[side].tolist() for side in (GENERATED, HELD_OUT)}
            for name, of in distances_of(sides, {each.measure: each.threshold for each in measures}).items()
        },
        leaked=leaks,
        skipped=[{"file": str(path), "reason": reason} for path, reason in sorted(skipped.items())],
    )
    result.warnings = cautions(result, sides[GENERATED].labels, sides[HELD_OUT].labels, width, known.files)
    return result


def _check_apart(folders: dict[str, ImageFolder]) -> None:
    trained = {path.resolve() for path in folders[TRAIN].files}
    if shared := [path for path in folders[HELD_OUT].files if path.resolve() in trained]:
        raise InputError(
            f"Expected held-out photographs that no model was trained on, found {len(shared)} training images among "
            f"them, such as {shared[0]}: give another split."
        )


def _read(folder: ImageFolder, limit: int | None, name: str, store: FeatureStore, skipped: dict[Path, str]) -> Side:
    classes = folder.classes or {"": folder.files}
    parts = [
        store.of_files(thin(files, limit), "clean", f"clean features of {folder.root.name}/{label}".rstrip("/"))
        for label, files in classes.items()
    ]
    labels = [label for label, part in zip(classes, parts, strict=True) for _ in part.files]
    skipped.update(pair for part in parts for pair in part.skipped)
    files = tuple(path for part in parts for path in part.files)
    if not files:
        reason = next((f" ({path.name}: {why})" for part in parts for path, why in part.skipped), "")
        raise InputError(f"Expected readable images in {folder.root}, found none{reason}: check the {name} folder.")
    return Side(folder.root, files, np.array(labels, object), np.concatenate([part.array for part in parts]))


def _search(
    sides: Mapping[str, Side],
    known: Side,
    width: int,
    store: FeatureStore,
    lpips: LPIPS | None,
    lpips_size: int,
    progress: Progress,
) -> None:
    """Fill in the nearest of the ``known`` images for each image of each side, by each measure."""

    def images() -> list[Iterable[np.ndarray]]:
        return [
            changed(side.files, name, width) if name in KINDS else map(read_image, side.files)
            for name, side in sides.items()
        ]

    mirrored = store.of_files(known.files, "clean", "clean features of mirrored training images", mirrored=True)
    found = {
        INCEPTION: [nearest_features(side.features, known.features, mirrored.array) for side in sides.values()],
        STRUCTURE: nearest_structure(images(), known.files, device=store.inception.device, progress=progress),
    }
    if lpips is not None:
        found[LPIPS_NAME] = nearest_lpips(images(), known.files, lpips, size=lpips_size, progress=progress)
    for measure, nearest in found.items():
        for side, its_own in zip(sides.values(), nearest, strict=True):
            side.nearest[measure] = its_own


def _usual_width(files: Sequence[Path]) -> int:
    """The median shorter side of some of the images."""
    return int(np.median([min(read_image(path).shape[:2]) for path in thin(tuple(files), 16)]))


def cautions(
    found: Memorisation, generated: np.ndarray, held_out: np.ndarray, width: int, train: Sequence[Path]
) -> list[str]:
    """What a reader of the figures should know."""
    said = []
    if (found.counts[HELD_OUT] + 1) * found.quantile < 1:
        said.append(
            f"{found.counts[HELD_OUT]} held-out photographs are too few for a quantile of {found.quantile:.3g}: the "
            f"threshold is their smallest distance, and {1 / (found.counts[HELD_OUT] + 1):.1%} of new photographs "
            "would fall below it"
        )
    if found.leaked:
        said.append(
            f"{len(found.leaked)} held-out photographs are training images or copies of them, left out: "
            f"{', '.join(Path(path).name for path in found.leaked[:5])}{', ...' if len(found.leaked) > 5 else ''}"
        )
    for measure in found.measures:
        missed = [f"{each.kind} {each.flagged} of {each.n}" for each in measure.copies if each.share < 0.95]
        if missed:
            said.append(
                f"by {measure.measure} not all copies made on purpose are flagged ({', '.join(missed)}): its share "
                "understates memorisation"
            )
    if far := [measure.measure for measure in found.measures if measure.z < -3]:
        said.append(
            f"generated images lie further from the training images than photographs do (by {', '.join(far)}), as blur "
            "and artefacts make them: that none is flagged does not show that a better model would not copy"
        )
    shares = {label: (np.mean(generated == label), np.mean(held_out == label)) for label in {*generated, *held_out}}
    if "" not in shares and max(abs(ours - theirs) for ours, theirs in shares.values()) > 0.05:
        text = ", ".join(
            f"{label} {ours:.0%} of the generated and {theirs:.0%} of the held-out"
            for label, (ours, theirs) in sorted(shares.items())
        )
        said.append(
            f"the class shares differ ({text}), and classes lie more or less close together: see them one by one"
        )
    if width != (known := _usual_width(train)):
        said.append(
            f"generated images are {width} pixels wide and training images {known}: distances hold the difference; "
            "compare with photographs prepared at the generated size"
        )
    if found.skipped:
        said.append(f"{len(found.skipped)} files could not be read and are left out")
    return said
