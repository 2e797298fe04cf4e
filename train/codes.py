"""Photographs -> codes: what the transformer is trained on. See ``code_files`` for the formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retinar.engine.checkpoint import digest, load_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, plain
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.code_files import MAX_VOCABULARY, CodeSet, CodeWriter, Layout
from retinar.train.crops import fingerprint, to_tensor
from retinar.train.data.images import ImageSet
from retinar.train.device import pick_device

__all__ = ["CodeSet", "encode_folder", "encode_pixels"]

VIEWS = ("image", "mirror")
BLOCK = 32
"""Images between two notes of progress: what a kill costs at most."""
GPU_ROWS = 16


def encode_folder(
    data: Path | str,
    tokenizer: Path | str,
    out: Path | str,
    split: str = "train",
    layout: Layout = "packed",
    *,
    dataset: str = "fundus",
    device: str = "auto",
    progress: Progress = plain,
) -> dict[str, Any]:
    """Codes of one split's photographs and of their mirrors, into ``out``; what meta.json says of them.

    ``tokenizer``: a checkpoint of any kind. The photographs have its ``image_size``. An interrupted call is taken up
    where it stopped, a finished one is recognised and nothing done; other contents in ``out`` are refused. Codes are
    computed in fp32 and do not depend on how the work is cut. ``dataset`` names upstream's folders. InputError as the
    parts raise it.
    """
    where = pick_device(device)
    model = load_tokenizer(tokenizer, device=where)
    config = model.config
    if config.codebook_size > MAX_VOCABULARY:
        raise InputError(f"Expected a codebook of at most {MAX_VOCABULARY} codes, found {config.codebook_size}.")
    images = ImageSet(data, split, size=config.image_size)
    identity = {
        "split": split,
        "classes": list(images.classes),
        "grid": config.grid,
        "images": len(images),
        "views": len(VIEWS),
        "tokenizer_digest": digest(tokenizer),
        "photographs_sha256": fingerprint(images),
    }
    stem = f"{dataset}{config.image_size}"
    writer = CodeWriter(out, layout, identity, stem=stem)
    names = [path.relative_to(images.root).as_posix() for path in images.paths]
    meta = {
        "view_names": list(VIEWS),
        "image_size": config.image_size,
        "tokenizer_config": config.to_dict(),
        "names": names,
    }
    if not writer.complete:
        with progress(f"encode {split}", len(images)) as bar:
            bar.advance(writer.done)
            for first in range(writer.done, len(images), BLOCK):
                chosen = range(first, min(first + BLOCK, len(images)))
                codes = encode_pixels(model, images.load_batch(chosen))
                writer.write(codes, images.labels[chosen.start : chosen.stop])
                bar.advance(len(chosen))
            writer.finish(images.labels, meta)
    return {**writer.identity, "path": str(out)}


@torch.no_grad()
def encode_pixels(model: VQTokenizer, pixels_BHWC: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """uint8 [B, H, W, 3] -> codes uint16 [B, 2, T] of the images and their mirrors.

    Convolutions may round differently for another number of images, and a code near a boundary flips. So they always
    get the same number: one on the CPU (batches gain nothing there), 16 on a GPU, the last ones padded; and no TF32.
    """
    device = next(model.parameters()).device
    views = np.stack([pixels_BHWC, pixels_BHWC[:, :, ::-1]], axis=1).reshape(-1, *pixels_BHWC.shape[1:])
    rows = 1 if device.type == "cpu" else GPU_ROWS
    found = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for first in range(0, len(views), rows):
            part = views[first : first + rows]
            padded = np.zeros((rows, *part.shape[1:]), np.uint8)
            padded[: len(part)] = part
            found.append(model.encode(to_tensor(padded).to(device))[: len(part)].flatten(1).cpu())
    codes = torch.cat(found).view(len(pixels_BHWC), len(VIEWS), -1)
    return codes.numpy().astype(np.uint16)
