"""A folder of images that can be stopped at any moment and goes on where it stopped.

``run.json`` is written first and says what the folder is: it decides whether a later call continues this run or is
refused. Every image is written whole or not at all; a continuation keeps those that are readable and say what they
should, and makes the others. Nothing in the folder tells when or in how many goes it was made, so that the end is
byte-equal to an uninterrupted run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from retinar import __version__
from retinar.engine import images, provenance
from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write, sha256_file, write_json
from retinar.engine.pipeline import Sampled
from retinar.engine.progress import Progress, plain
from retinar.engine.request import Request, SamplingParams, label_name
from retinar.engine.sampler import Sampler

# The fields of a config that change images and that no weight shows: the digests say nothing about them.
UNSHOWN = ("n_head", "n_kv_head", "grid", "rope_base", "norm_eps", "norm_groups")
# What may differ between a run and its continuation: where the files lie, and what each image records for itself.
NOT_COMPARED = ("version", "implementation", "model", "tokenizer_path", "config")


@dataclass(frozen=True)
class Item:
    """One image of the folder: what is asked for, and its file relative to the folder."""

    request: Request
    file: str


class Limits(NamedTuple):
    """Images made at the same time, and the cache they share, of every process; no image depends on them."""

    max_images: int
    page_size: int
    pages: int | None


Make = Callable[[Sampler, Path, Sequence[Item], Limits, Progress], None]
"""``make(sampler, out, missing, limits, progress)`` writes the missing images: here, or in processes of their own."""


def save_images(
    sampler: Sampler, out: Path, items: Sequence[Item], limits: Limits, progress: Progress
) -> Generator[int, None, None]:
    """Make these images; yields each one's index once its file is there. Close it when leaving early."""
    files = {item.request.index: item.file for item in items}

    def save(done: Sampled) -> int:
        images.save_png(images.to_pil(done.pixels_HWC, done.fields), out / files[done.request.index])
        return done.request.index

    return sampler.sample([item.request for item in items], **limits._asdict(), progress=progress, finish=save)


def make_here(sampler: Sampler, out: Path, missing: Sequence[Item], limits: Limits, progress: Progress) -> None:
    """Write the missing images in this process."""
    with closing(save_images(sampler, out, missing, limits, progress)) as saved:
        for _ in saved:
            pass


def generate_folder(
    sampler: Sampler,
    out: Path | str,
    labels_counts: Sequence[tuple[int | str, int]],
    *,
    seed: int = 0,
    cfg_scale: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_interval: int = -1,
    start_index: int = 0,
    npz: bool = False,
    max_images: int | None = None,
    page_size: int = 16,
    pages: int | None = None,
    model: Path | str | None = None,
    tokenizer: Path | str | None = None,
    config: str | None = None,
    make: Make = make_here,
    progress: Progress = plain,
) -> dict[str, Any]:
    """Make ``count`` images of each label into ``out``, or what is missing of them; returns a summary.

    Writes ``images/{label}/{index:06d}.png`` (indices run through all labels from ``start_index``), ``run.json`` (all
    parameters), and when all images are there ``manifest.jsonl`` (a line an image, by index), ``sheet.png`` and on
    request ``samples.npz`` (``arr_0`` uint8 [n, h, w, 3]). ``model``, ``tokenizer`` and ``config`` say where they
    came from, noted for `reproduce`. ``make`` writes the images that are missing; with
    `retinar.engine.shards.Shards` several GPUs share them. InputError for parameters out of range, and for a folder
    that holds another run; OSError as the file system has it.
    """
    for label, count in labels_counts:
        if count < 1:
            raise InputError(f"count must be at least 1, got {count} for label {label!r}; ask for some images")
    labels = [label for label, count in labels_counts for _ in range(count)]
    if not labels:
        raise InputError("expected at least one label, got none; name one with --label")
    params = SamplingParams(cfg_scale, temperature, top_k, top_p, cfg_interval)
    items = _items(sampler, sampler.requests(labels, params, seed, start_index))
    height, width = _image_size(sampler)

    limits = Limits(sampler.at_once if max_images is None else max_images, page_size, pages)
    sampler.plan([item.request for item in items], **limits._asdict())  # refused before anything is written

    out = Path(out)
    run = {
        "format": 1,
        "software": provenance.SOFTWARE,
        "version": __version__,
        "checkpoint": sampler.origin.checkpoint,
        "tokenizer": sampler.origin.tokenizer,
        "config_read": _config_read(sampler),
        "dtype": sampler.origin.dtype,
        "parameters": params.to_dict(),
        "seed": int(seed),
        "start_index": int(start_index),
        "labels": _counts(items, sampler.classes),
        "implementation": sampler.origin.implementation,
        "model": None if model is None else str(Path(model).resolve()),
        "tokenizer_path": None if tokenizer is None else str(Path(tokenizer).resolve()),
        "config": str(Path(config).resolve()) if config and Path(config).is_file() else config,
    }
    _claim(out, run)
    kept, foreign = _kept(sampler, out, items, progress)
    missing = [item for item in items if item.request.index not in kept]
    make(sampler, out, missing, limits, progress)

    _write_manifest(out, items)
    _write_sheet(out, items, sampler, seed, params)
    if npz:
        images.save_npz(out / "samples.npz", (_pixels(out / item.file) for item in items), len(items), height, width)
    summary: dict[str, Any] = {"out": str(out), "images": len(items), "made": len(missing), "kept": len(kept)}
    if foreign:
        summary["kept_from_another_implementation"] = foreign
    return summary


def _config_read(sampler: Sampler) -> dict[str, dict[str, Any]]:
    configs = {"transformer": sampler.config.to_dict(), "tokenizer": sampler.require_tokenizer().config.to_dict()}
    return {name: {key: config[key] for key in UNSHOWN if key in config} for name, config in configs.items()}


def _items(sampler: Sampler, requests: Sequence[Request]) -> list[Item]:
    names = {request.label: _folder_name(label_name(request.label, sampler.classes)) for request in requests}
    twice = {name for name, uses in Counter(name.casefold() for name in names.values()).items() if uses > 1}
    folders = {label: f"{name}-{label}" if name.casefold() in twice else name for label, name in names.items()}
    return [Item(request, f"images/{folders[request.label]}/{request.index:06d}.png") for request in requests]


def _folder_name(label: str) -> str:
    # class names come from a checkpoint: nothing in them may leave the folder
    return re.sub(r"[^\w.+-]", "_", label).lstrip(".") or "_"


def _counts(items: Sequence[Item], classes: Sequence[str]) -> list[list[Any]]:
    """Runs of equal labels as [name, count], in index order."""
    counts: list[list[Any]] = []
    for item in items:
        name = label_name(item.request.label, classes)
        if counts and counts[-1][0] == name:
            counts[-1][1] += 1
        else:
            counts.append([name, 1])
    return counts


def _image_size(sampler: Sampler) -> tuple[int, int]:
    """Height and width in pixels; InputError without a tokenizer, before anything is written."""
    side = sampler.config.grid * sampler.require_tokenizer().config.downsample
    return side, side


def _claim(out: Path, run: dict[str, Any]) -> None:
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
        write_json(record, run)
    for leftover in [*out.glob(".*.partial"), *(out / "images").glob("*/.*.partial")]:
        leftover.unlink(missing_ok=True)  # of a killed writer


def _kept(sampler: Sampler, out: Path, items: Sequence[Item], progress: Progress) -> tuple[set[int], int]:
    """Indices whose files are whole and say what they should, and how many of them another implementation made."""
    for folder in {(out / item.file).parent for item in items}:
        folder.mkdir(parents=True, exist_ok=True)
    there = [item for item in items if (out / item.file).exists()]
    kept: set[int] = set()
    foreign = 0

    def check(item: Item) -> provenance.Provenance | None:
        try:
            found = provenance.read(out / item.file)
        except InputError:
            return None
        wanted = provenance.expected(sampler.origin, item.request)
        same = all(found.fields[name] == value for name, value in wanted.items())
        return found if same and found.untouched else None

    if not there:
        return kept, foreign
    with progress("checking images", len(there)) as bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(there), 256):  # in blocks, so that Ctrl-C does not wait for a million queued files
            block = there[start : start + 256]
            for item, found in zip(block, pool.map(check, block), strict=True):
                if found is not None:
                    kept.add(item.request.index)
                    maker = (found.fields["version"], found.implementation)
                    foreign += maker != (__version__, sampler.origin.implementation)
                bar.advance()
    return kept, foreign


def _write_manifest(out: Path, items: Sequence[Item]) -> None:
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
                    "codes_sha256": text["codes_sha256"],
                    "pixels_sha256": text["pixels_sha256"],
                    "sha256": sha256_file(out / item.file),
                }
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_sheet(out: Path, items: Sequence[Item], sampler: Sampler, seed: int, params: SamplingParams) -> None:
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.request.label, []).append(item)
    limit = images.sheet_limit(len(groups))
    shown = [
        (label_name(label, sampler.classes), len(group), [_open(out / item.file) for item in group[:limit]])
        for label, group in list(groups.items())[: images.SHEET_GROUPS]
    ]
    footer = (
        f"synthetic · {provenance.SOFTWARE} {__version__} · checkpoint {sampler.origin.checkpoint[:12]} · seed {seed}"
    )
    footer += f" · guidance {params.cfg_scale:g} · temperature {params.temperature:g}"
    footer += f" · top-k {params.top_k}" * (params.top_k > 0) + f" · top-p {params.top_p:g}" * (params.top_p < 1)
    with atomic_write(out / "sheet.png") as temporary:
        images.sheet(shown, footer).save(temporary, format="PNG", compress_level=6)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(_open(path))
