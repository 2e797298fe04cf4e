"""The flags by which LlamaGen's scripts describe a tokenizer, and the tokenizer that they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from retinar.engine.checkpoint import load_tokenizer
from retinar.engine.config import TokenizerConfig, tokenizer_config
from retinar.engine.tokenizer import VQTokenizer
from retinar.train.upstream.flags import Flags, refuse

SIZES = ("VQ-16", "VQ-8")


class Default(int):
    """A flag's default where the file may know better: what is said by hand must agree with the file."""


def add_tokenizer_flags(flags: Flags, *, required: bool) -> None:
    """--vq-model, --vq-ckpt, --codebook-size and --codebook-embed-dim."""
    flags.add_argument("--vq-model", choices=SIZES, default="VQ-16", help="16 or 8 pixels a code")
    flags.add_argument("--vq-ckpt", type=Path, required=required, help="LlamaGen's tokenizer, or a folder of ours")
    flags.add_argument("--codebook-size", type=int, default=Default(16384))
    flags.add_argument("--codebook-embed-dim", type=int, default=Default(8))


def image_size(text: str) -> int:
    """The type of --image-size and --image-size-eval: LlamaGen's sizes and any other above 0."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}, which is no number of pixels")
    return int(text)


def checked_tokenizer(
    args: argparse.Namespace, size: int, device: torch.device | str = "cpu", *, ema: bool = False
) -> VQTokenizer:
    """The tokenizer in --vq-ckpt for images of ``size`` pixels; InputError where it is not what the flags say."""
    if args.vq_ckpt is None:
        refuse("a tokenizer", "no --vq-ckpt", "give LlamaGen's file or a folder of ours")
    check_size(args.vq_model, size)
    model = load_tokenizer(args.vq_ckpt, {"image_size": size}, ema, device=device)
    check_config(args, model.config)
    return model


def check_size(vq_model: str, size: int) -> None:
    """InputError for a size that the tokenizer cannot cut into codes."""
    downsample = tokenizer_config(vq_model).downsample
    if size % downsample:
        refuse(f"--image-size as a multiple of {downsample} for --vq-model {vq_model}", str(size), "choose another")


def check_config(args: argparse.Namespace, config: TokenizerConfig) -> None:
    """InputError where a checkpoint's config is not what the flags say."""
    if (wanted := tokenizer_config(args.vq_model).downsample) != config.downsample:
        near = next((name for name in SIZES if tokenizer_config(name).downsample == config.downsample), None)
        advice = f"add --vq-model {near}" if near else "give another --vq-ckpt"
        refuse(f"{wanted} pixels a code (--vq-model {args.vq_model})", f"{config.downsample} in {args.vq_ckpt}", advice)
    for flag, found in (("codebook_size", config.codebook_size), ("codebook_embed_dim", config.codebook_embed_dim)):
        given = getattr(args, flag)
        if not isinstance(given, Default) and given != found:
            name = f"--{flag.replace('_', '-')}"
            refuse(f"{name} {found} for {args.vq_ckpt}", str(given), f"leave out {name}, the file tells")
