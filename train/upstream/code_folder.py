"""LlamaGen's ``--code-path``: folders with two small files an image, packed once into one file that can be mapped.

Training reads codes in another order each epoch. From a million small files that takes a crowd of workers and still
waits; so the processes of the first run each pack a share of the images, and every run maps the result. It lies in
``.packed-...`` beside the codes, or under ``--cloud-save-path`` where the codes may not be written to or several
machines train, and is made anew when the files have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinar.engine.errors import InputError
from retinar.engine.files import write_json
from retinar.train.code_files import CodeSet
from retinar.train.code_layout import FORMAT, MAX_VOCABULARY, META, meta_file, note_file
from retinar.train.loop import say
from retinar.train.world import World

READ_AT_ONCE = 1024  # images


@dataclass(frozen=True)
class Folder:
    """``path``/{stem}_codes and {stem}_labels. ``more``: the same images cut otherwise (crop range 1.05 beside 1.1),
    whose views count as views of these."""

    path: Path
    stem: str
    more: Path | None

    @classmethod
    def find(cls, code_path: str, stem: str) -> Folder:
        """As upstream's dataset finds them: where a path has "ten_crop/", "ten_crop_105/" is looked for, too."""
        found = [f"{code_path}/{stem}_{kind}" for kind in ("codes", "labels")]
        for folder in found:
            if not Path(folder).is_dir():
                raise InputError(
                    f"Expected codes in {found[0]} and labels in {found[1]}, found no folder {folder}: make them with "
                    "python -m retinar.train.upstream.extract_codes_c2i, or correct --code-path and --image-size."
                )
        if note_file(Path(code_path), stem).exists():
            raise InputError(f"Expected complete codes in {found[0]}, found an extraction under way: let it end first.")
        others = [folder.replace("ten_crop/", "ten_crop_105/") for folder in found]
        more = others != found and all(Path(folder).is_dir() for folder in others)
        return cls(Path(code_path), stem, Path(others[0]).parent if more else None)

    def files(self, base: Path, kind: str) -> Path:
        """The folder of "codes" or "labels" under ``base``."""
        return base / f"{self.stem}_{kind}"

    def bases(self) -> tuple[Path, ...]:
        return (self.path,) if self.more is None else (self.path, self.more)

    def identity(self) -> dict[str, Any]:
        """What tells whether the files are still those that were packed: how many, how large, the newest's time."""
        found: dict[str, Any] = {"stem": self.stem}
        for number, base in enumerate(self.bases()):
            count = size = newest = 0
            with os.scandir(self.files(base, "codes")) as entries:
                for entry in entries:
                    if entry.name.endswith(".npy"):
                        stat = entry.stat()
                        count, size, newest = count + 1, size + stat.st_size, max(newest, stat.st_mtime_ns)
            found[f"codes_{number}"] = [str(base.resolve()), count, size, newest]
        return found

    def numbers(self) -> list[int]:
        """The images, in order."""
        names = os.listdir(self.files(self.path, "codes"))
        found = sorted(int(name[:-4]) for name in names if name.endswith(".npy") and name[:-4].isdigit())
        if not found:
            raise InputError(
                f"Expected files 0.npy, 1.npy, … in {self.files(self.path, 'codes')}, found none: extract the codes."
            )
        return found

    def read(self, number: int) -> tuple[NDArray[np.uint16], int]:
        """One image: codes [views, T] and its label. InputError for what is missing, damaged or not alike."""
        views, labels = [], []
        for base in self.bases():
            codes_file, label_file = (self.files(base, kind) / f"{number}.npy" for kind in ("codes", "labels"))
            try:
                codes, label = np.load(codes_file), np.load(label_file)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(
                    f"Expected an array in {codes_file} and in {label_file.parent}, found {error}: extract again."
                ) from error
            codes = codes[:, None] if codes.ndim == 2 else codes
            whole = codes.ndim == 3 and len(codes) == 1 and np.issubdtype(codes.dtype, np.integer) and label.size == 1
            if not whole or codes.min() < 0 or codes.max() >= MAX_VOCABULARY:
                raise InputError(
                    f"Expected whole numbers [1, views, T] from 0 to {MAX_VOCABULARY - 1} and one label, found "
                    f"{codes.dtype} {list(codes.shape)} and {list(label.shape)} in {codes_file}: extract again."
                )
            views.append(codes[0].astype(np.uint16))
            labels.append(int(label.reshape(())))
        if len({(part.shape, label) for part, label in zip(views, labels, strict=True)}) > 1:
            raise InputError(
                f"Expected image {number} of {self.more} to have the label and as many views as that of {self.path}, "
                "found others: extract both from the same photographs."
            )
        return np.concatenate(views), labels[0]


def open_codes(args: argparse.Namespace, stem: str, world: World) -> CodeSet:
    """The codes of ``args.code_path``, packed where they are not yet. All processes call it."""

    def look() -> tuple[Folder, dict[str, Any]]:
        folder = Folder.find(args.code_path, stem)
        return folder, folder.identity()

    folder, identity = world.on_main(look)
    beside = world.size == world.local_size and os.access(folder.path, os.W_OK)
    key = hashlib.sha256(json.dumps([str(base.resolve()) for base in folder.bases()]).encode()).hexdigest()[:8]
    cache = (folder.path if beside else Path(args.cloud_save_path)) / f".packed-{stem}-{key}"
    if not world.on_main(lambda: _is_current(cache, identity)):
        if world.main:
            say(f"packing the codes of {folder.path} into {cache}, once.")
        _pack(folder, cache, identity, world)
    return world.together(lambda: CodeSet(cache))


def _is_current(cache: Path, identity: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((cache / META).read_text(encoding="utf-8"))["source"] == identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _pack(folder: Folder, cache: Path, identity: Mapping[str, Any], world: World) -> None:
    partial = Path(world.on_main(lambda: _begin(folder, cache)))
    numbers = world.together(folder.numbers)
    share = range(world.rank * len(numbers) // world.size, (world.rank + 1) * len(numbers) // world.size)
    labels, highest = world.together(lambda: _write_share(folder, partial / "codes.npy", numbers, share))
    every = world.gather((labels, highest))
    world.on_main(lambda: _finish(folder, cache, partial, identity, every))


def _begin(folder: Folder, cache: Path) -> str:
    """A folder for the file, of full length; plain writes will fill it: stores into a map would die on a full disk."""
    here = f"{cache.name}.{socket.gethostname()}"
    for leftover in cache.parent.glob(f"{here}.*.partial"):
        if not _alive(int(leftover.suffixes[-2][1:])):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = cache.with_name(f"{here}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    numbers = folder.numbers()
    codes, _ = folder.read(numbers[0])
    with open(partial / "codes.npy", "wb") as file:
        shape = (len(numbers), *codes.shape)
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return str(partial)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()


def _write_share(folder: Folder, file: Path, numbers: list[int], share: range) -> tuple[NDArray[np.int64], int]:
    """Pack these images; their labels and the highest code."""
    labels, highest = np.zeros(len(share), np.int64), 0
    with open(file, "r+b") as handle:
        np.lib.format.read_magic(handle)
        (_, *wanted), _, _ = np.lib.format.read_array_header_1_0(handle)
        handle.seek(2 * share.start * int(np.prod(wanted)), os.SEEK_CUR)
        for first in range(share.start, share.stop, READ_AT_ONCE):
            block = []
            for i in range(first, min(first + READ_AT_ONCE, share.stop)):
                codes, labels[i - share.start] = folder.read(numbers[i])
                if codes.shape != tuple(wanted):
                    raise InputError(
                        f"Expected {wanted[0]} views of {wanted[1]} codes in all files of {folder.path}, found "
                        f"{codes.shape[0]} of {codes.shape[1]} in {numbers[i]}.npy: extract again."
                    )
                block.append(codes)
            packed = np.stack(block).astype("<u2")
            highest = max(highest, int(packed.max()))
            handle.write(packed.tobytes())
        handle.flush()
        os.fsync(handle.fileno())
    return labels, highest


def _finish(folder: Folder, cache: Path, partial: Path, identity: Mapping[str, Any], every: list[Any]) -> None:
    """Labels and description; the folder gets its name. Where another run was as quick, its folder is taken."""
    labels = np.concatenate([labels for labels, _ in every])
    np.save(partial / "labels.npy", labels)
    shape = np.load(partial / "codes.npy", mmap_mode="r").shape
    grid = round(shape[2] ** 0.5)
    if grid * grid != shape[2]:
        raise InputError(f"Expected a square of codes an image in {folder.path}, found {shape[2]}: extract again.")
    described = {
        "format": FORMAT,
        "kind": "codes",
        "source": dict(identity),
        "classes": [str(label) for label in range(max(1, int(labels.max()) + 1))],
        "grid": grid,
        "views": shape[1],
        "images": shape[0],
        "tokenizer_config": {"codebook_size": max(highest for _, highest in every) + 1},
        "names": _names(folder, shape[0]),
    }
    write_json(partial / META, described)
    if cache.exists() and not _is_current(cache, identity):
        shutil.rmtree(cache)
    try:
        os.rename(partial, cache)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not _is_current(cache, identity):
            raise


def _names(folder: Folder, images: int) -> list[str] | None:
    """The photographs' names, where ours extracted them: a step that goes wrong can then name them."""
    try:
        names = json.loads(meta_file(folder.path, folder.stem).read_text(encoding="utf-8"))["names"]
        return list(names) if len(names) == images else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
