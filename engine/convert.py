"""Upstream's files <-> our folders, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retinar.engine import weights as disk
from retinar.engine.checkpoint import (
    OWN_FIELDS,
    file_weights,
    is_folder,
    load_gpt,
    load_tokenizer,
    read_config,
    save_gpt,
    save_tokenizer,
)
from retinar.engine.errors import InputError
from retinar.engine.fields import ConfigSource
from retinar.engine.files import atomic_write
from retinar.engine.model import GPT
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.upstream import kind_of, read_upstream

UPSTREAM_SUFFIXES = (".pt", ".pth")


def convert(
    src: Path | str,
    dst: Path | str,
    config: ConfigSource | None = None,
    *,
    ema: bool = False,
    classes: Sequence[str] = (),
    tokenizer: Path | str | None = None,
    discriminator: bool = False,
) -> dict[str, Any]:
    """Write ``src`` (our folder or any upstream file, transformer or tokenizer) as ``dst`` -> a summary for JSON.

    ``dst`` ending in .pt or .pth becomes an upstream file ({"model": …, "config": …}; a transformer's .pth is the bare
    dict of upstream's FSDP training), anything else our folder. Stored dtypes are kept. ``config`` as in ``load_gpt``;
    ``ema`` takes an upstream file's averaged weights. For a transformer's folder, ``classes`` names the labels and
    ``tokenizer`` is a checkpoint to put inside; for tokenizers, ``discriminator`` keeps the PatchGAN. Raises
    InputError for bad input.
    """
    src, dst = Path(src), Path(dst)
    folder = is_folder(src)
    stored = read_config(src) if folder else {}
    file = None if folder else read_upstream(src, ema=ema)
    kind = stored["kind"] if file is None else kind_of(file.weights)
    if kind not in ("gpt", "tokenizer"):
        found = "a diffusion model" if kind == "iddpm" else "other weights"
        raise InputError(f"Expected a LlamaGen transformer or tokenizer in {src}, found {found}: give another path.")
    if kind == "tokenizer" and (tokenizer is not None or classes):
        raise InputError(f"Expected a transformer in {src} to add a tokenizer or classes to, found a tokenizer.")
    model = (load_gpt if kind == "gpt" else load_tokenizer)(src, config, ema, dtype=None)

    notes = []
    patchgan = _patchgan(src) if file is None else file.discriminator
    if patchgan and not discriminator:
        notes.append("the discriminator was left out")
    patchgan = patchgan if discriminator else {}
    extra = {key: value for key, value in stored.items() if key not in OWN_FIELDS}
    if file is not None and file.steps is not None:
        extra["steps"] = file.steps
    card = (src / "README.md").read_text(encoding="utf-8") if (src / "README.md").is_file() and folder else None
    if dst.suffix in UPSTREAM_SUFFIXES:
        if tokenizer is not None or classes:
            raise InputError(f"Expected a folder to put a tokenizer or classes into, found {dst}: name a folder.")
        if (src / "tokenizer").is_dir():
            notes.append(f"the tokenizer was left out, convert {src / 'tokenizer'} by itself")
        _write_upstream(dst, model, patchgan)
    elif isinstance(model, GPT):
        inside = tokenizer or (src if (src / "tokenizer").is_dir() else None)
        save_gpt(
            dst,
            model,
            classes=classes or stored.get("classes", ()),
            tokenizer=None if inside is None else load_tokenizer(inside, dtype=None),
            card=card,
            extra=extra,
        )
    else:
        save_tokenizer(dst, model, card=card, extra=extra, discriminator=patchgan)
    return {
        "source": str(src),
        "destination": str(dst),
        "kind": kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": model.config.to_dict(),
        "notes": notes,
    }


def _write_upstream(dst: Path, model: GPT | VQTokenizer, patchgan: dict[str, torch.Tensor]) -> None:
    # Clones: torch.save writes a view's whole storage, so w1 and w3 would each carry the packed matrix.
    weights = {key: tensor.clone() for key, tensor in file_weights(model).items()}
    content: dict[str, Any] = {"model": weights, "config": model.config.to_dict()}
    if patchgan:
        content["discriminator"] = patchgan
    dst.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(dst) as partial:
        torch.save(weights if dst.suffix == ".pth" and isinstance(model, GPT) else content, partial)


def _patchgan(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / disk.DISCRIMINATOR
    return dict(disk.read_file(path)) if path.is_file() else {}
