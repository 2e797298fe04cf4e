"""A folder of images that can be stopped at any moment and goes on where it stopped, whatever makes the images.

``run.json`` is written first and says what the folder is: it decides whether a later call continues this run or is
refused. Every image is written whole or not at all; a continuation keeps those that are readable and say what they
should, and makes the others. Nothing in the folder tells when or in how many goes it was made, so that the end is
byte-equal to an uninterrupted run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from retinar import __version__
from retinar.engine import images, provenance
from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write, sha256_file, write_json
from retinar.engine.progress import Progress
from retinar.engine.request import Asked, label_name

# What may differ between a run and its continuation: where the files lie, and what each image records for itself.
NOT_COMPARED = ("version", "implementation", "model", "tokenizer_path", "config")

Ask = TypeVar("Ask", bound=Asked)


@dataclass(frozen=True)
class Item(Generic[Ask]):
    """One image of the folder: what is asked for, and its file relative to the folder."""

    request: Ask
    file: str


@dataclass(frozen=True)
class Folder(Generic[Ask]):
    """A folder to be made.

    ``run``: what ``run.json`` will say (`common`, and what the sampler adds); ``size``: height and width in pixels;
    ``note``: the parameters in words, for the sheet's last line; ``read``: reads an image back, InputError for what is
    not whole; ``make``: writes the images that are missing.
    """

    items: Sequence[Item[Ask]]
    origin: provenance.Origin
    run: Mapping[str, Any]
    size: tuple[int, int]
    note: str
    read: Callable[[Path], provenance.Record]
    make: Callable[[Path, Sequence[Item[Ask]]], None]

    def complete(self, out: Path | str, *, npz: bool, progress: Progress) -> dict[str, Any]:
        """Make it in ``out``, or what is missing of it; returns a summary.

        Writes ``images/{label}/{index:06d}.png``, ``run.json``, and when all images are there ``manifest.jsonl`` (a
        line an image, by index), ``sheet.png`` and on request ``samples.npz`` (``arr_0`` uint8 [n, h, w, 3]).
        InputError for a folder that holds another run; OSError as the file system has it.
        """
        out = Path(out)
        _claim(out, self.run)
        kept, foreign = self._kept(out, progress)
        missing = [item for item in self.items if item.request.index not in kept]
        self.make(out, missing)
        _write_manifest(out, self.items)
        self._write_sheet(out)
        if npz:
            pixels = (_pixels(out / item.file) for item in self.items)
            images.save_npz(out / "samples.npz", pixels, len(self.items), *self.size)
        counts = {"images": len(self.items), "made": len(missing), "kept": len(kept)}
        return {"out": str(out), **counts, **({"kept_from_another_implementation": foreign} if foreign else {})}

    def _kept(self, out: Path, progress: Progress) -> tuple[set[int], int]:
        """Indices whose files are whole and say what they should, and how many of them another implementation made."""
        for folder in {(out / item.file).parent for item in self.items}:
            folder.mkdir(parents=True, exist_ok=True)
        there = [item for item in self.items if (out / item.file).exists()]
        kept: set[int] = set()
        foreign = 0

        def check(item: Item[Ask]) -> provenance.Record | None:
            try:
                found = self.read(out / item.file)
            except InputError:
                return None
            wanted = provenance.expected(self.origin, item.request)
            same = all(found.fields[name] == value for name, value in wanted.items())
            return found if same and found.untouched else None

        if not there:
            return kept, foreign
        with progress("checking images", len(there)) as bar, ThreadPoolExecutor() as pool:
            # in blocks, so that Ctrl-C does not wait for a million queued files
            for start in range(0, len(there), 256):
                block = there[start : start + 256]
                for item, found in zip(block, pool.map(check, block), strict=True):
                    if found is not None:
                        kept.add(item.request.index)
                        maker = (found.fields["version"], found.implementation)
                        foreign += maker != (__version__, self.origin.implementation)
                    bar.advance()
        return kept, foreign

    def _write_sheet(self, out: Path) -> None:
        groups: dict[int, list[Item[Ask]]] = {}
        for item in self.items:
            groups.setdefault(item.request.label, []).append(item)
        limit = images.sheet_limit(len(groups))
        shown = [
            (label_name(label, self.origin.classes), len(group), [_open(out / item.file) for item in group[:limit]])
            for label, group in list(groups.items())[: images.SHEET_GROUPS]
        ]
        made_by = f"{provenance.SOFTWARE} {__version__} · checkpoint {self.origin.checkpoint[:12]}"
        footer = f"synthetic · {made_by} · seed {self.items[0].request.stream.seed} · {self.note}"
        with atomic_write(out / "sheet.png") as temporary:
            images.sheet(shown, footer).save(temporary, format="PNG", compress_level=6)


def items_of(requests: Sequence[Ask], classes: Sequence[str]) -> list[Item[Ask]]:
    """A file for each image: a folder for each class, whatever the names."""
    names = {request.label: _folder_name(label_name(request.label, classes)) for request in requests}
    twice = {name for name, uses in Counter(name.casefold() for name in names.values()).items() if uses > 1}
    folders = {label: f"{name}-{label}" if name.casefold() in twice else name for label, name in names.items()}
    return [Item(request, f"images/{folders[request.label]}/{request.index:06d}.png") for request in requests]


def _folder_name(label: str) -> str:
    # class names come from a checkpoint: nothing in them may leave the folder
    return re.sub(r"[^\w.+-]", "_", label).lstrip(".") or "_"


def common(items: Sequence[Item[Ask]], origin: provenance.Origin) -> dict[str, Any]:
    """What ``run.json`` says of every folder."""
    first = items[0].request
    return {
        "format": 1,
        "software": provenance.SOFTWARE,
        "version": __version__,
        "checkpoint": origin.checkpoint,
        "dtype": origin.dtype,
        "parameters": first.params.to_dict(),
        "seed": first.stream.seed,
        "start_index": first.index,
        "labels": _counts(items, origin.classes),
        "implementation": origin.implementation,
    }


def ask_for(labels_counts: Sequence[tuple[int | str, int]]) -> list[int | str]:
    """A label for each image. InputError for counts below 1, and for no label at all."""
    for label, count in labels_counts:
        if count < 1:
            raise InputError(f"count must be at least 1, got {count} for label {label!r}; ask for some images")
    labels = [label for label, count in labels_counts for _ in range(count)]
    if not labels:
        raise InputError("expected at least one label, got none; name one with --label")
    return labels


def _counts(items: Sequence[Item[Ask]], classes: Sequence[str]) -> list[list[Any]]:
    """Runs of equal labels as [name, count], in index order."""
    counts: list[list[Any]] = []
    for item in items:
        name = label_name(item.request.label, classes)
        if counts and counts[-1][0] == name:
            counts[-1][1] += 1
        else:
            counts.append([name, 1])
    return counts


def _claim(out: Path, run: Mapping[str, Any]) -> None:
    """Make the folder this run's: write ``run.json``, or check that the one there is the same run's."""
    record = out / "run.json"
    if record.is_file():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            differing = [key for key in run if key not in NOT_COMPARED and found.get(key) != run[key]]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{record} is damaged ({error}); choose another --out or remove that folder") from error
        if differing:
            key = differing[0]
            raise InputError(
                f"{out} holds a different run: its {key} is {json.dumps(found.get(key))}, and {json.dumps(run[key])} "
                "was asked for; choose another --out, or the same parameters to continue it"
            )
    elif out.exists() and (not out.is_dir() or any(not entry.name.endswith(".partial") for entry in out.iterdir())):
        raise InputError(f"{out} exists and is no folder of a generate run (it has no run.json); choose a new --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, dict(run))
    for leftover in [*out.glob(".*.partial"), *(out / "images").glob("*/.*.partial")]:
        leftover.unlink(missing_ok=True)  # of a killed writer


def _write_manifest(out: Path, items: Sequence[Item[Ask]]) -> None:
    with atomic_write(out / "manifest.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for item in items:
            with Image.open(out / item.file) as image:
                text = image.info
                line = {
                    "file": item.file,
                    "index": item.request.index,
                    "label": text["label"],
                    "seed": item.request.stream.seed,
                    "synthetic": True,
                    **({"codes_sha256": text["codes_sha256"]} if "codes_sha256" in text else {}),
                    "pixels_sha256": text["pixels_sha256"],
                    "sha256": sha256_file(out / item.file),
                }
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(_open(path))
