"""Photographs -> codes: what the transformer is trained on. See ``code_layout`` for the formats."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retinar.engine.checkpoint import digest, load_tokenizer
from retinar.engine.config import ConfigSource, TokenizerConfig
from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, plain, silent
from retinar.train.code_files import MAX_VOCABULARY, CodeSet, CodeWriter, Layout
from retinar.train.crops import fingerprint
from retinar.train.data.images import ImageSet
from retinar.train.device import pick_device
from retinar.train.encoding import Encoding, Photographs, run_in_processes, shares
from retinar.train.patience import apart, patient
from retinar.train.views import Kind, Views
from retinar.train.world import World

__all__ = ["CodeSet", "encode_folder", "encode_images"]


def encode_folder(
    data: Path | str,
    tokenizer: Path | str,
    out: Path | str,
    split: str = "train",
    layout: Layout = "packed",
    *,
    dataset: str = "fundus",
    views: Kind = "mirror",
    crop_range: float = 1.1,
    device: str = "auto",
    devices: Sequence[str] = (),
    world: World | None = None,
    progress: Progress = plain,
) -> dict[str, Any]:
    """Codes of one split's photographs, a few views of each, into ``out``; what describes them.

    ``tokenizer``: a checkpoint of any kind. With views "mirror" (the image and its mirror) the photographs have its
    ``image_size``; for "ten-crop" they may have any, and should have ``crop_range`` times that: smaller ones are
    enlarged. ``dataset`` names upstream's folders. For ``devices`` and ``world`` see :func:`encode_images`; without
    them everything happens here, on ``device``. InputError as the parts raise it.
    """
    tokenizer = Path(tokenizer)
    world = world or World(pick_device(device))

    def photographs(config: TokenizerConfig) -> ImageSet:
        images = ImageSet(data, split, size=config.image_size if views == "mirror" else None)
        side = Views(views, config.image_size, crop_range).side
        if world.main and views == "ten-crop" and (smallest := min(images.load(0).shape[:2])) < side:
            print(
                f"photographs of {smallest} pixels are enlarged to {side} for ten crops: retinar prepare --size "
                f"{side} keeps more of them.",
                file=sys.stderr,
                flush=True,
            )
        return images

    return encode_images(
        photographs,
        tokenizer,
        out,
        layout,
        views=views,
        crop_range=crop_range,
        stem=dataset,
        identity=lambda images: {"split": split, "photographs_sha256": fingerprint(images)},
        label=f"encode {split}",
        devices=devices,
        world=world,
        progress=progress,
    )


def encode_images(
    photographs: Callable[[TokenizerConfig], Any],
    tokenizer: Path,
    out: Path | str,
    layout: Layout,
    *,
    views: Kind,
    crop_range: float,
    stem: str,
    identity: Callable[[Any], dict[str, Any]],
    label: str,
    config: ConfigSource | None = None,
    threads: int | None = None,
    devices: Sequence[str] = (),
    world: World,
    progress: Progress,
) -> dict[str, Any]:
    """The codes of ``photographs(config of the tokenizer)`` into ``out``; what describes them.

    An interrupted call is taken up where it stopped, a finished one is recognised and nothing done; other contents are
    refused. Codes are computed in fp32 and do not depend on how the work is cut: not on threads, and not on the number
    of processes, be they those of ``world`` or one for each of ``devices``, started here. ``identity(photographs)``:
    what besides the tokenizer and the views decides the contents. ``stem`` comes before the size in upstream's names.
    """
    world = patient(world)
    images: Photographs | None = None

    def begin() -> tuple[CodeWriter, TokenizerConfig, list[int]]:
        nonlocal images
        settings = load_tokenizer(tokenizer, config).config
        if settings.codebook_size > MAX_VOCABULARY:
            raise InputError(f"Expected a codebook of at most {MAX_VOCABULARY} codes, found {settings.codebook_size}.")
        cut = Views(views, settings.image_size, crop_range)
        images = photographs(settings)
        decides = {
            **identity(images),
            "classes": list(images.classes),
            "grid": settings.grid,
            "images": len(images),
            "views": len(cut.names),
            "tokenizer_digest": digest(tokenizer),
            **({"crop_range": crop_range} if views == "ten-crop" else {}),
        }
        writer = CodeWriter(out, layout, decides, stem=f"{stem}{settings.image_size}")
        return writer, settings, [] if writer.complete else writer.blocks.missing()

    writer, settings, missing = world.on_main(begin)
    if writer.complete:
        return {**writer.identity, "path": str(out)}
    if images is None:
        images = photographs(settings)
    cut = Views(views, settings.image_size, crop_range)
    each = max(1, (threads or torch.get_num_threads()) // max(1, len(devices)))
    encoding = Encoding(images, tokenizer, settings, cut, writer.blocks, each)
    _encode(encoding, missing, devices, world, label, progress)
    world.on_main(partial(writer.finish, images.labels, _meta(images, cut, settings)))
    return {**writer.identity, "path": str(out)}


def _encode(
    encoding: Encoding, missing: list[int], devices: Sequence[str], world: World, label: str, progress: Progress
) -> None:
    blocks = encoding.blocks
    share = shares(missing, world.size)[world.rank]
    if world.size > 1:
        label += f" ({world.size} processes, the first one's share)"
    count = sum(len(blocks.span(first)) for first in share)
    done = 0 if world.size > 1 else len(encoding.images) - count
    with (progress if world.main else silent)(label, count + done) as bar:
        bar.advance(done)
        if devices and len(share) > 1:
            run_in_processes(encoding, share, devices, bar)
        else:
            device = torch.device(devices[0]) if devices else world.device
            apart(world, lambda: encoding.run(share, device, bar.advance))


def _meta(images: Photographs, cut: Views, settings: TokenizerConfig) -> dict[str, Any]:
    return {
        "view_names": list(cut.names),
        "image_size": settings.image_size,
        "tokenizer_config": settings.to_dict(),
        "names": [path.relative_to(images.root).as_posix() for path in images.paths],
    }
