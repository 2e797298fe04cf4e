"""LlamaGen's files: which weights a dict of theirs holds, and their layout beside our packed one.

In memory the two inputs of the feed-forward lie in one matrix, ``w13`` (w1's rows, then w3's), which optimizer, EMA and
kernels share; files keep upstream's ``w1`` and ``w3``. ``wqkv`` is packed in both.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinar.engine.errors import InputError

Weights = dict[str, Tensor]

CONSOLIDATED = "consolidated.pth"
"""The file of whole weights in a checkpoint folder of upstream's FSDP training."""

_W13 = re.compile(r"^(?P<block>(?:.*\.)?feed_forward)\.w13\.weight$")
_W1 = re.compile(r"^(?P<block>(?:.*\.)?feed_forward)\.w1\.weight$")
# Wrappers (DDP, torch.compile) that leave their mark on the keys; the rotary table that some files carry along.
_WRAPPERS = ("module.", "_orig_mod.")
_STRAY = {"freqs_cis"}


def to_upstream_state_dict(weights: Mapping[str, Tensor]) -> Weights:
    """Our packed layout -> upstream's; ``w1`` and ``w3`` are views of the rows of ``w13``."""
    result: Weights = {}
    for key, tensor in weights.items():
        if match := _W13.match(key):
            w1_FX, w3_FX = tensor.chunk(2)
            result[f"{match['block']}.w1.weight"], result[f"{match['block']}.w3.weight"] = w1_FX, w3_FX
        else:
            result[key] = tensor
    return result


def from_upstream_state_dict(weights: Mapping[str, Tensor]) -> Weights:
    """Upstream's layout -> ours. Already packed keys stay, wrappers' prefixes and a stray ``freqs_cis`` go.

    A ``w1`` without its ``w3`` stays as it is, for the loader to name as unknown.
    """
    weights = clean_keys(weights)
    result: Weights = {}
    for key, tensor in weights.items():
        if (match := _W1.match(key)) and (other := f"{match['block']}.w3.weight") in weights:
            if tensor.shape != weights[other].shape:
                raise InputError(
                    f"Expected {key} and {other} of one shape, found {list(tensor.shape)} and "
                    f"{list(weights[other].shape)}: this is not a LlamaGen transformer."
                )
            result[f"{match['block']}.w13.weight"] = torch.cat([tensor, weights[other]])
        elif not (key.endswith(".w3.weight") and key.replace(".w3.", ".w1.") in weights):
            result[key] = tensor
    return result


def clean_keys(weights: Mapping[str, Tensor]) -> Weights:
    """The weights without the prefixes of DDP and torch.compile and without strays that are no weights."""
    result: Weights = {}
    for key, tensor in weights.items():
        while key.startswith(_WRAPPERS):
            key = key.removeprefix("module.").removeprefix("_orig_mod.")
        if key not in _STRAY:
            result[key] = tensor
    return result


def kind_of(weights: Mapping[str, Tensor]) -> str | None:
    """ "gpt", "tokenizer" or None, by telling keys."""
    if "tok_embeddings.weight" in weights or "cls_embedding.embedding_table.weight" in weights:
        return "gpt"
    if "quantize.embedding.weight" in weights or "encoder.conv_in.weight" in weights:
        return "tokenizer"
    return None


@dataclass(frozen=True)
class UpstreamFile:
    """What a ``.pt`` or ``.pth`` holds for us. Tensors may be mapped from the file: copy what is to outlive it."""

    path: Path
    weights: Weights
    args: dict[str, Any] = field(default_factory=dict)
    """The flags of the training run that wrote it, where they are there."""
    config: dict[str, Any] | None = None
    """The model's config, which our own conversions put beside the weights."""
    steps: int | None = None
    discriminator: Weights = field(default_factory=dict)
    """A tokenizer's PatchGAN, where there is one."""


def read_upstream(path: Path | str, *, ema: bool = False) -> UpstreamFile:
    """Any of upstream's layouts: a bare dict, or one under "model", "module" or "state_dict"; "ema" when asked for.

    A folder of upstream's FSDP training counts as the ``consolidated.pth`` in it. Nothing but tensors, plain values and
    the ``argparse.Namespace`` of upstream's flags is unpickled: a file that asks for more raises InputError, and so
    does one that is missing, cut short or no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CONSOLIDATED
    content = unpickle(path)
    if not isinstance(content, Mapping):
        raise InputError(f"Expected a checkpoint in {path}, found a {type(content).__name__}: give another file.")
    where = _place(path, content, ema)
    weights = content if where is None else content[where]
    strange = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        raise InputError(f"Expected only tensors among the weights in {path}, found {strange[0]!r}: give another file.")
    args, steps = content.get("args"), content.get("steps")
    config, discriminator = content.get("config"), content.get("discriminator")
    others = {str(key): value for key, value in discriminator.items()} if isinstance(discriminator, Mapping) else {}
    return UpstreamFile(
        path=path,
        weights=clean_keys({str(key): value for key, value in weights.items()}),
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
        config=dict(config) if isinstance(config, Mapping) else None,
        steps=steps if isinstance(steps, int) else None,
        discriminator=clean_keys({key: value for key, value in others.items() if isinstance(value, Tensor)}),
    )


def _place(path: Path, content: Mapping[Any, Any], ema: bool) -> str | None:
    """The key under which the weights lie; None: they are the dict itself."""
    held = [key for key in ("model", "module", "state_dict", "ema") if isinstance(content.get(key), Mapping)]
    if ema:
        if "ema" not in held:
            raise InputError(f"Expected averaged weights (ema) in {path}, found none: leave out ema.")
        return "ema"
    if held:
        return held[0]
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return None
    found = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
    raise InputError(
        f"Expected weights in {path} as a bare dict or under model, module, state_dict or ema, found {found}: "
        "give another file."
    )


def unpickle(path: Path) -> Any:
    """``torch.load`` without running anything from the file; every way to fail becomes one sentence."""
    if not path.is_file():
        raise InputError(f"Expected a checkpoint at {path}, found no such file: check the path.")
    with path.open("rb") as file:  # no permission stays an OSError, unlike what the readers below make of damage
        pickled = file.read(1) == b"\x80"
    # Mapping leaves the optimizer's state on the disk; files from before torch 1.6 are no zip and are read whole.
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols: the sentences below say enough
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle, zip and tensor readers fail in a dozen ways, OSError among them
        text = str(error)
        if asked := re.search(r"(?:GLOBAL|Unsupported class) `?([\w.]+)", text):
            found = f"a pickle that calls {asked[1]}"
        elif pickled and "Unsupported operand" in text:
            found = "a pickle with instructions that no checkpoint needs"
        else:
            raise InputError(
                f"Expected a PyTorch checkpoint in {path}, found a file that is damaged, cut short or something else: "
                "download or copy it again."
            ) from error
        raise InputError(
            f"Expected only tensors and plain values in {path}, found {found}: it was not run; do not trust this file."
        ) from error
