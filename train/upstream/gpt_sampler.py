"""The sampler that the flags of ``sample_c2i_ddp.py`` mean: checkpoints checked against what the flags say of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from retinar.engine import checkpoint
from retinar.engine.config import GPT_SIZES, GPTConfig
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.pipeline import Developer
from retinar.engine.sampler import Sampler
from retinar.engine.vq_decoder import ImageDecoder
from retinar.train.upstream.flags import refuse
from retinar.train.upstream.sample_files import resized
from retinar.train.upstream.vq_flags import Default, checked_tokenizer
from retinar.train.world import World

PRECISIONS = {"none": "float32", "bf16": "bfloat16"}
STATED = {"num_classes": "num_classes", "codebook_size": "vocab_size"}
"""Flags that a file answers by itself; what is said by hand must agree with it."""


class EvalSampler(Sampler):
    """A sampler whose images are resized to ``eval_size`` pixels before they become bytes."""

    eval_size: int

    def _developer(self) -> Developer:
        developer = super()._developer()
        developer.decoder = _Resizing(developer.decoder, self.eval_size)
        return developer


class _Resizing:
    def __init__(self, decoder: ImageDecoder, size: int) -> None:
        self.decoder, self.size = decoder, size

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        return resized(self.decoder.decode(codes_Bhw), self.size)


def load_sampler(args: argparse.Namespace, world: World) -> EvalSampler:
    """The transformer and the tokenizer of the flags on this process's device. All processes call it."""
    path = Path(args.gpt_ckpt)
    gpt = load_gpt(args, path)
    tokenizer = checked_tokenizer(args, args.image_size)
    grid = args.image_size // args.downsample_size
    if tokenizer.config.grid != grid:
        refuse(
            f"--downsample-size {tokenizer.config.downsample} for --vq-model {args.vq_model}",
            str(args.downsample_size),
            "set them alike",
        )
    classes = tuple(checkpoint.read_config(path).get("classes", ())) if checkpoint.is_folder(path) else ()
    # Gigabytes: one process reads them for all.
    digests = world.on_main(lambda: [checkpoint.digest(path), checkpoint.digest(args.vq_ckpt)])
    sampler = EvalSampler(
        gpt,
        tokenizer,
        classes=classes,
        digest=digests[0],
        tokenizer_digest=digests[1],
        device=world.device,
        dtype=PRECISIONS[args.precision],
    )
    sampler.eval_size = args.image_size_eval
    return sampler


def load_gpt(args: argparse.Namespace, path: Path) -> GPT:
    """The transformer of --gpt-ckpt. A folder of ours knows what it is, upstream's files are what the flags say."""
    if checkpoint.is_folder(path):
        model = checkpoint.load_gpt(path)
        _check_folder(args, path, model.config)
        return model
    stated: dict[str, Any] = {**GPT_SIZES[args.gpt_model], "grid": args.image_size // args.downsample_size}
    for flag, field in STATED.items():
        if not isinstance(given := getattr(args, flag), Default):
            stated[field] = given
    try:
        return checkpoint.load_gpt(path, stated)
    except InputError as error:
        flags = " ".join(f"--{flag.replace('_', '-')} {getattr(args, flag)}" for flag in ("gpt_model", *STATED))
        raise InputError(f"{error} (The config is {flags}.)") from None


def _check_folder(args: argparse.Namespace, path: Path, config: GPTConfig) -> None:
    shape = (config.n_layer, config.dim)
    sizes = [name for name, fields in GPT_SIZES.items() if (fields["n_layer"], fields["dim"]) == shape]
    size = sizes[0] if sizes else args.gpt_model
    if size != args.gpt_model:
        refuse(f"--gpt-model {size} for {path}", args.gpt_model, f"add --gpt-model {size}")
    grid = args.image_size // args.downsample_size
    if config.grid != grid:
        refuse(
            f"--image-size over --downsample-size of {config.grid} for {path}",
            f"{args.image_size} / {args.downsample_size}",
            "set them as it was trained",
        )
    for flag, field in STATED.items():
        given, found = getattr(args, flag), getattr(config, field)
        if not isinstance(given, Default) and given != found:
            name = f"--{flag.replace('_', '-')}"
            refuse(f"{name} {found} for {path}", str(given), f"leave out {name}, the folder tells")
