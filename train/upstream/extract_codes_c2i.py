"""LlamaGen's ``autoregressive/train/extract_codes_c2i.py``: photographs in class folders -> codes for training.

torchrun --nproc_per_node=8 -m retinar.train.upstream.extract_codes_c2i --vq-ckpt CKPT --data-path IN --code-path OUT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from retinar.engine.config import TokenizerConfig
from retinar.engine.progress import Progress, plain
from retinar.train.codes import encode_images
from retinar.train.data.pool import default_workers
from retinar.train.upstream.flags import Flags, exit_code, refuse
from retinar.train.upstream.image_folder import ImageFolder
from retinar.train.upstream.vq_flags import add_tokenizer_flags, check_config, check_size, image_size
from retinar.train.world import World, joined, launched

OTHER_DATASETS = ("coco", "openimage", "pexels", "t2i", "t2i_code", "t2i_image", "imagenet_code")
"""Datasets of LlamaGen's that are no class folders."""


def parser() -> Flags:
    """LlamaGen's flags with its defaults."""
    flags = Flags("extract_codes_c2i", "Codes of photographs in class folders, for train_c2i.")
    flags.add_argument("--data-path", type=Path, required=True, help="a folder of class folders, of any count")
    flags.add_argument("--code-path", type=Path, required=True, help="gets {dataset}{image-size}_codes and ..._labels")
    add_tokenizer_flags(flags, required=True)
    flags.add_argument("--dataset", default="imagenet", help="the name in the folders")
    flags.add_argument("--image-size", type=image_size, default=256)
    flags.add_argument("--ten-crop", action="store_true", help="ten crops instead of the image and its mirror")
    flags.add_argument("--crop-range", type=float, default=1.1, help="the size that crops are cut from / --image-size")
    flags.add_argument("--global-seed", type=int, default=0, help="changes nothing, as there")
    flags.add_argument("--num-workers", type=int, default=24, help="threads of each process, at most one a core")
    flags.add_argument("--debug", action="store_true", help="one process, without torchrun")
    return flags


def extract(args: argparse.Namespace, world: World, progress: Progress = plain) -> None:
    """Write {code-path}/{dataset}{size}_codes/{i}.npy int64 [1, views, T] and ..._labels/{i}.npy int64 [1]."""

    def photographs(config: TokenizerConfig) -> ImageFolder:
        check_config(args, config)
        return ImageFolder(args.data_path)

    encode_images(
        photographs,
        args.vq_ckpt,
        args.code_path,
        "upstream",
        views="ten-crop" if args.ten_crop else "mirror",
        crop_range=args.crop_range,
        stem=args.dataset,
        identity=lambda images: {"split": None, "photographs_listing": images.listing()},
        label="extract codes",
        config={"image_size": args.image_size},
        threads=max(1, min(args.num_workers, default_workers() // world.local_size)),
        world=world,
        progress=progress,
    )


def check(args: argparse.Namespace) -> None:
    """InputError for flags that cannot be met."""
    check_dataset(args.dataset)
    if args.debug and launched():
        refuse("one process with --debug", "several", "leave out --debug or torchrun")
    check_size(args.vq_model, args.image_size)


def check_dataset(name: str) -> None:
    """InputError for data that are no class folders, and for what cannot be part of a folder's name."""
    if name in OTHER_DATASETS:
        refuse("--dataset imagenet, or any name for class folders", name, "sort the photographs by class")
    if "/" in name or not name:
        refuse("--dataset as part of a folder's name", repr(name), "choose another name")


def main(argv: Sequence[str] | None = None) -> int:
    """Extract as the flags say; the exit code."""

    def work() -> int:
        args = parser().parse_args(argv)
        check(args)
        with joined("auto") as world:
            extract(args, world)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
