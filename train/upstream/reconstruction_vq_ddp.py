"""LlamaGen's ``tokenizer/tokenizer_image/reconstruction_vq_ddp.py``: what a tokenizer makes of photographs.

torchrun --nproc_per_node=8 -m retinar.train.upstream.reconstruction_vq_ddp --vq-ckpt CKPT --data-path DATA
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from retinar.engine.checkpoint import is_folder
from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write, write_text
from retinar.engine.images import to_bytes
from retinar.engine.progress import Progress, plain, silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.upstream import unpickle
from retinar.train.crops import to_tensor
from retinar.train.data.pool import default_workers
from retinar.train.encoding import ahead, exact, lone_threads
from retinar.train.loop import say
from retinar.train.patience import apart, patient
from retinar.train.upstream.extract_codes_c2i import check_dataset
from retinar.train.upstream.flags import Flags, exit_code, refuse
from retinar.train.upstream.image_folder import ImageFolder
from retinar.train.upstream.quality import WINDOW, as_unit, psnr, ssim
from retinar.train.upstream.sample_files import png, remove_leftovers, resized, write_npz
from retinar.train.upstream.vq_flags import add_tokenizer_flags, checked_tokenizer, image_size
from retinar.train.views import Pixels, center_crop
from retinar.train.world import World, joined

Figures = tuple[float, float]
"""PSNR and SSIM of an image."""


def parser() -> Flags:
    """LlamaGen's flags with its defaults."""
    flags = Flags("reconstruction_vq_ddp", (__doc__ or "").splitlines()[0])
    add = flags.add_argument
    add("--data-path", type=Path, required=True, help="a folder of class folders, images of any size")
    add("--dataset", default="imagenet", help="class folders, whatever the name")
    add_tokenizer_flags(flags, required=False)
    add("--image-size", type=image_size, default=256)
    add("--image-size-eval", type=image_size, default=256, help="what photographs and images are resized to")
    add("--sample-dir", default="reconstructions")
    add("--per-proc-batch-size", type=int, default=32, help="images at once on a GPU; a CPU takes one by one")
    add("--global-seed", type=int, default=0, help="part of the folder's name")
    add("--num-workers", type=int, default=4, help="threads of each process, at most one a core")
    return flags


def load(args: argparse.Namespace, world: World) -> VQTokenizer:
    """The tokenizer, with averaged weights where its file holds some, as upstream takes them."""
    if args.vq_ckpt is not None and not is_folder(args.vq_ckpt) and "ema" in (content := unpickle(args.vq_ckpt)):
        return checked_tokenizer(args, args.image_size, world.device, ema=isinstance(content["ema"], dict))
    return checked_tokenizer(args, args.image_size, world.device)


def folder_name(args: argparse.Namespace, model: VQTokenizer) -> str:
    """The folder that LlamaGen would write to, in --sample-dir."""
    config = model.config
    return (
        f"{args.vq_model}-{args.dataset}-size-{args.image_size}-size-{args.image_size_eval}"
        f"-codebook-size-{config.codebook_size}-dim-{config.codebook_embed_dim}-seed-{args.global_seed}"
    )


def reconstruct(args: argparse.Namespace, world: World, progress: Progress = plain) -> Path:
    """Write {index:06d}.png of all photographs, the .npz and _results.txt beside them; the folder."""
    world = patient(world)
    images = world.together(lambda: ImageFolder(args.data_path))
    model = world.together(lambda: load(args, world))
    folder = Path(args.sample_dir) / folder_name(args, model)

    def claim() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        say(f"Saving .png samples at {folder}")

    world.on_main(claim)
    mine = range(world.rank, len(images), world.size)

    def make() -> list[Figures]:
        with (progress if world.main else silent)("reconstructions", len(mine)) as bar:
            found = []
            for figures in _make(args, model, images, mine, folder, world):
                found.append(figures)
                bar.advance()
            return found

    found = np.array([each for part in world.gather(apart(world, make)) for each in part])

    def complete() -> None:
        line = "PSNR: {:f}, SSIM: {:f} ".format(*found.mean(axis=0))
        say(line)
        write_text(folder.with_name(f"{folder.name}_results.txt"), f"{line}\n")
        path, size = write_npz(folder, len(images), args.image_size_eval), args.image_size_eval
        say(f"Saved .npz file to {path} [shape=({len(images)}, {size}, {size}, 3)].")

    world.on_main(complete)
    return folder


def _make(
    args: argparse.Namespace, model: VQTokenizer, images: ImageFolder, mine: range, folder: Path, world: World
) -> Iterator[Figures]:
    """Write the images of ``mine``; the figures of each. Batches are alike in length, so that no image depends on
    where they are cut."""

    def photograph(index: int) -> Pixels:
        return center_crop(images.load(index), args.image_size)

    def alone(index: int) -> Figures:
        return _batch(model, photograph(index)[None], [index], args.image_size_eval, folder)[0]

    threads = max(1, min(args.num_workers, default_workers() // world.local_size))
    rows = args.per_proc_batch_size
    with lone_threads(threads) as pool, exact():
        if world.device.type == "cpu":
            yield from ahead(pool, alone, mine, 2 * threads)
            return
        ready = ahead(pool, photograph, mine, rows + 2 * threads)
        for first in range(0, len(mine), rows):
            indices = mine[first : first + rows]
            pixels = np.stack([next(ready) for _ in indices])
            padding = np.zeros((rows - len(indices), *pixels.shape[1:]), np.uint8)
            yield from _batch(model, np.concatenate([pixels, padding]), indices, args.image_size_eval, folder)


@torch.no_grad()
def _batch(model: VQTokenizer, pixels_BHWC: Pixels, indices: Sequence[int], size: int, folder: Path) -> list[Figures]:
    device = next(model.parameters()).device
    images_BCHW = to_tensor(pixels_BHWC)
    made_BHWC = to_bytes(resized(model.decode(model.encode(images_BCHW.to(device))), size))
    wanted_BHWC = as_unit(resized(images_BCHW, size))
    found = []
    for index, made_HWC, wanted_HWC in zip(indices, made_BHWC, wanted_BHWC, strict=False):  # padding comes last
        try:
            with atomic_write(png(folder, index)) as temporary:
                Image.fromarray(made_HWC).save(temporary, format="PNG")
        except OSError as error:
            raise InputError(
                f"Expected to write images in {folder}, found {error}: make room or fix the disk, then run the same "
                "command again."
            ) from error
        restored = torch.from_numpy(made_HWC).float() / 255
        found.append((psnr(restored, wanted_HWC), ssim(restored, wanted_HWC)))
    return found


def check(args: argparse.Namespace) -> None:
    """InputError for flags that cannot be met."""
    check_dataset(args.dataset)
    if args.per_proc_batch_size < 1:
        refuse("--per-proc-batch-size of at least 1", str(args.per_proc_batch_size), "upstream's is 32")
    if args.image_size_eval < WINDOW:
        refuse(f"--image-size-eval of at least {WINDOW}", str(args.image_size_eval), "SSIM has windows of that size")


def main(argv: Sequence[str] | None = None) -> int:
    """Reconstruct as the flags say; the exit code."""

    def work() -> int:
        args = parser().parse_args(argv)
        check(args)
        with joined("auto") as world:
            reconstruct(args, world)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
