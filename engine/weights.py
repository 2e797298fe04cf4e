"""Weights on the disk: safetensors, in one file or in shards with an index, with a digest over all of them."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
DISCRIMINATOR = "discriminator.safetensors"
MAX_SHARD_BYTES = 5_000_000_000


def write_weights(folder: Path, weights: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> str:
    """Write ``weights`` into ``folder`` -> their digest. More than ``max_shard_bytes`` become shards and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for key, tensor in weights.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            write_file(folder / name, shard)
        placed = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return weights_digest(folder)


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor), one file after the other. Tensors may be mapped from the file: copy what is to outlive it.

    Raises InputError for damaged files.
    """
    for path in weight_files(folder):
        yield from read_file(path)


def read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (key, tensor) of one safetensors file; as :func:`read_weights`."""
    from safetensors import SafetensorError, safe_open  # here, so that training and measuring need torch alone

    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safe_open is no dict)
                yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise InputError(f"Expected weights in {path}, found a damaged file: copy or download it again.") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder`` in order. Raises InputError where one is missing or the index is damaged."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        raise InputError(f"Expected {SINGLE} in {folder}, found none: the folder is not complete.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"Expected the index of shards {folder / INDEX}, found it damaged: copy it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"Expected the shard {name} in {folder}, found none: the folder is not complete.")
    return [folder / name for name in names]


def weights_digest(folder: Path) -> str:
    """SHA-256 of the one file; of several, the SHA-256 over their sorted hexadecimal digests, each with a newline."""
    digests = sorted(sha256_file(path) for path in weight_files(folder))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def write_file(path: Path, shard: Mapping[str, Tensor]) -> None:
    """One safetensors file (not atomic: for folders that nobody reads yet)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors refuses tensors that share storage, as views of a packed matrix do: copy those, one shard at a time.
    whole = {}
    for key, tensor in shard.items():
        tensor = tensor.detach().cpu().contiguous()
        part = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        whole[key] = tensor.clone() if part else tensor
    try:
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps what the file system said, and is no OSError
        full = "os error 28" in str(error).lower() or "no space left" in str(error).lower()
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
