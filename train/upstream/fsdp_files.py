"""The optimizer files of LlamaGen's FSDP training: ``optimizer.RRRRR-of-WWWWW.pth``, what each process held.

PyTorch's FSDP (the first, ``use_orig_params``) flattens each wrapped module: its parameters one after another, each
beginning at a multiple of 16 bytes in the dtype that computes, the whole padded to a multiple of the shards and cut
evenly. A process keeps, of every parameter, the numbers that fall into its piece: a flat tensor, nothing where none do.
LlamaGen wraps every block, and the rest with the model. A single shard keeps whole tensors in their shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.upstream import unpickle
from retinar.train.config import OptimConfig
from retinar.train.upstream.adamw import MOMENTS, Moments, Shapes, by_name, numbering, param_groups

ALIGNMENT = 16  # bytes
ALIGNED = {torch.bfloat16: ALIGNMENT // 2, torch.float32: ALIGNMENT // 4}
"""Numbers that a parameter's place is a multiple of, by the dtype that computes."""
_FILE = re.compile(r"optimizer\.(\d{5,})-of-(\d{5,})\.pth")
_BLOCK = re.compile(r"layers\.\d+\.")


def file_name(rank: int, processes: int) -> str:
    """Upstream's name for the file of one process."""
    return f"optimizer.{rank:05d}-of-{processes:05d}.pth"


def pieces(shapes: Shapes, shards: int, align: int) -> list[dict[str, slice]]:
    """For each shard: which numbers of which flattened parameters it holds; parameters of which it has none are absent.

    ``shapes`` must be in the order of upstream's modules, whose ``w1`` and ``w3`` come before ``w2``.
    """
    modules: dict[str, list[str]] = {}
    for name in shapes:
        block = _BLOCK.match(name)
        modules.setdefault(block[0] if block else "", []).append(name)
    found: list[dict[str, slice]] = [{} for _ in range(shards)]
    for names in modules.values():
        starts, end = {}, 0
        for name in names:
            starts[name] = _up(end, align)
            end = starts[name] + math.prod(shapes[name])
        each = _up(end, shards) // shards
        for name in names:
            start, stop = starts[name], starts[name] + math.prod(shapes[name])
            for shard in range(start // each, (stop - 1) // each + 1):
                first, last = max(start, shard * each), min(stop, (shard + 1) * each)
                found[shard][name] = slice(first - start, last - start)
    return found


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def split(
    optimizer: Mapping[str, Moments], config: OptimConfig, shapes: Shapes, *, processes: int, shards: int, align: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, content) for each process, one at a time; under hsdp there are fewer ``shards``, and they repeat."""
    held = pieces(shapes, shards, align)
    groups = param_groups(config, shapes)
    for rank in range(processes):
        mine = held[rank % shards]
        state = {
            number: {
                "step": optimizer[name]["step"].clone(),
                **{key: _cut(optimizer[name][key], mine[name], shards) for key in MOMENTS},
            }
            for number, name in enumerate(numbering(shapes))
            if name in mine
        }
        yield file_name(rank, processes), {"state": state, "param_groups": groups}


def _cut(whole: Tensor, piece: slice, shards: int) -> Tensor:
    return whole.clone() if shards == 1 else whole.flatten()[piece].clone()  # a view would be saved whole


class Shards:
    """The optimizer files of a folder, for any number of processes to read from. ``shapes``: those of the model.

    Files are mapped, tensors put together when they are asked for. InputError for files that are missing, damaged or of
    another model.
    """

    def __init__(self, folder: Path, shapes: Shapes) -> None:
        self.folder, self.shapes = folder, shapes
        found = {match[0]: int(match[2]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
        counts = sorted(set(found.values()))
        if counts and (len(counts) > 1 or len(found) != counts[0]):
            raise InputError(
                f"Expected the optimizer files of one training in {folder}, {counts[0]} of them, found {len(found)}: "
                "copy the whole folder again."
            )
        count = counts[0] if counts else 0
        paths = [folder / file_name(rank, count) for rank in range(count)]
        self._files = [by_name(unpickle(path), shapes, str(path)) for path in paths]
        self._held = self._layout() if any(self._files) else []

    def __bool__(self) -> bool:
        """Whether there is any state."""
        return bool(self._held)

    def _layout(self) -> list[dict[str, slice]]:
        """How the files were cut. They do not say it, but their sizes leave one answer."""
        sizes = [{name: state["exp_avg"].numel() for name, state in file.items()} for file in self._files]
        count = len(self._files)
        for shards in (shards for shards in range(count, 0, -1) if count % shards == 0):
            for align in ALIGNED.values():
                held = pieces(self.shapes, shards, align)
                wanted = [{name: piece.stop - piece.start for name, piece in shard.items()} for shard in held]
                if all(size == wanted[rank % shards] for rank, size in enumerate(sizes)):
                    return held
        raise InputError(
            f"Expected the optimizer of this model in the {count} files of {self.folder}, found pieces of other sizes: "
            "give the --gpt-model and --num-classes that it was trained with."
        )

    def __getitem__(self, name: str) -> Moments:
        """The whole state of a parameter, by upstream's name."""
        parts = [file[name] for file, held in zip(self._files, self._held, strict=False) if name in held]
        whole: Moments = {"step": parts[0]["step"]}
        for key in MOMENTS:
            flat = [part[key].flatten() for part in parts]
            whole[key] = (flat[0] if len(flat) == 1 else torch.cat(flat)).view(tuple(self.shapes[name]))
        return whole
