"""LlamaGen's ``tokenizer/tokenizer_image/vq_train.py``: training of the tokenizer, data-parallel.

torchrun --nproc_per_node=8 -m retinar.train.upstream.vq_train --cloud-save-path CLOUD --data-path DATA
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from retinar.engine.config import TokenizerConfig, tokenizer_config
from retinar.engine.errors import InputError
from retinar.engine.perceptual import TORCHVISION_FILE as VGG16
from retinar.engine.progress import silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import loop
from retinar.train.config import OptimConfig, TokenizerTrainConfig
from retinar.train.data.pool import default_workers
from retinar.train.device import memory_advice
from retinar.train.perceptual import PerceptualLoss
from retinar.train.rng import seed_everything, seed_process
from retinar.train.upstream.checkpoints import Folders, ddp_folders
from retinar.train.upstream.extract_codes_c2i import check_dataset
from retinar.train.upstream.flags import Flags, exit_code, refuse
from retinar.train.upstream.gpt_flags import EMA_DECAY, total_steps
from retinar.train.upstream.image_folder import ImageFolder
from retinar.train.upstream.log import Log
from retinar.train.upstream.vq_flags import add_tokenizer_flags, check_size, checked_tokenizer, image_size
from retinar.train.upstream.vq_store import VqSource, VqStore, plain
from retinar.train.upstream.vq_task import UpstreamTokenizerTask
from retinar.train.world import World, joined

"""Torchvision's file, where torchvision leaves it: LlamaGen loads it through torchvision."""


def parser() -> Flags:
    """LlamaGen's flags with its defaults, and one of ours."""
    flags = Flags("vq_train", (__doc__ or "").splitlines()[0])
    add = flags.add_argument
    add("--data-path", type=Path, required=True, help="a folder of class folders, images of any size")
    add("--data-face-path", default=None, help="refused")
    add("--cloud-save-path", required=True, help="checkpoints go here; storage that all machines share")
    add("--no-local-save", action="store_true", help="no checkpoints in --results-dir")
    add_tokenizer_flags(flags, required=False)
    add("--finetune", action="store_true", help="begin at step 0 with what --vq-ckpt holds")
    add("--ema", action="store_true", help=f"also average the weights (decay {EMA_DECAY})")
    add("--codebook-l2-norm", action="store_true", default=True, help="always")
    add("--codebook-weight", type=float, default=1.0)
    add("--entropy-loss-ratio", type=float, default=0.0, help="0")
    add("--commit-loss-beta", type=float, default=0.25)
    add("--reconstruction-weight", type=float, default=1.0)
    add("--reconstruction-loss", choices=["l2", "l1"], default="l2")
    add("--perceptual-weight", type=float, default=1.0, help="0 needs no weights of VGG16")
    add("--disc-weight", type=float, default=0.5, help="0 leaves the discriminator out")
    add("--disc-start", type=int, default=20000)
    add("--disc-type", choices=["patchgan", "stylegan"], default="patchgan", help="stylegan is refused")
    add("--disc-loss", choices=["hinge", "vanilla", "non-saturating"], default="hinge", help="hinge")
    add("--gen-loss", choices=["hinge", "non-saturating"], default="hinge", help="hinge")
    add("--compile", action="store_true")
    add("--dropout-p", type=float, default=0.0)
    add("--results-dir", default="results_tokenizer_image")
    add("--dataset", default="imagenet", help="class folders, whatever the name")
    add("--image-size", type=image_size, default=256)
    add("--epochs", type=int, default=40)
    add("--lr", type=float, default=1e-4)
    add("--weight-decay", type=float, default=5e-2, help="changes nothing, as there: the optimizer is Adam")
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.95)
    add("--max-grad-norm", type=float, default=1.0, help="0: no clipping")
    add("--global-batch-size", type=int, default=128, help="images of a step, over all processes and parts")
    add("--global-seed", type=int, default=0)
    add("--num-workers", type=int, default=16, help="threads of each process that read ahead, at most one a core")
    add("--log-every", type=int, default=100)
    add("--ckpt-every", type=int, default=5000)
    add("--gradient-accumulation-steps", type=int, default=1, help="parts of a step (upstream ignores it)")
    add("--mixed-precision", choices=["none", "fp16", "bf16"], default="bf16", help="fp16 is refused")
    add("--perceptual-weights", default=None, help=f"ours: VGG16's weights; by default torchvision's {VGG16}")
    return flags


def check(args: argparse.Namespace) -> None:
    """Refuse what ours does not do. InputError with the flag, and what to do instead."""
    check_dataset(args.dataset)
    check_size(args.vq_model, args.image_size)
    only = {
        "data_face_path": (None, "it belongs to LlamaGen's t2i_image data; put all images into --data-path"),
        "disc_type": ("patchgan", "leave it out"),
        "disc_loss": ("hinge", "leave it out"),
        "gen_loss": ("hinge", "LlamaGen's non-saturating losses have input and target swapped; leave it out"),
        "entropy_loss_ratio": (0.0, "the entropy loss is not offered; leave it out"),
    }
    for flag, (wanted, advice) in only.items():
        if (given := getattr(args, flag)) != wanted:
            name = f"--{flag.replace('_', '-')}"
            refuse(f"no {name}" if wanted is None else f"{name} {wanted}", str(given), advice)
    if args.mixed_precision == "fp16":
        refuse("--mixed-precision bf16 or none", "fp16", "bf16 takes as little memory and needs no loss scaling")
    if args.max_grad_norm < 0:
        refuse("--max-grad-norm of at least 0", str(args.max_grad_norm), "0 is no clipping")
    if args.finetune and args.vq_ckpt is None:
        refuse("--vq-ckpt with --finetune", "none", "give LlamaGen's file or a folder of ours")
    parts, processes = args.gradient_accumulation_steps, int(os.environ.get("WORLD_SIZE", "1"))
    if parts < 1 or args.global_batch_size < 1 or args.global_batch_size % (parts * processes):
        refuse(
            f"--global-batch-size as a multiple of {processes} processes x --gradient-accumulation-steps {parts}",
            str(args.global_batch_size),
            "change one of them",
        )


def config_of(args: argparse.Namespace, model: TokenizerConfig) -> TokenizerTrainConfig:
    """The config of the flags. ``steps`` is left to the images."""
    optim = OptimConfig(
        lr=args.lr, betas=(args.beta1, args.beta2), weight_decay=0.0, grad_clip=args.max_grad_norm or None
    )
    return TokenizerTrainConfig(
        recipe=f"llamagen {args.vq_model}",
        model=model,
        optim=optim,
        disc_optim=optim,
        batch_size=args.global_batch_size,
        accumulation=args.gradient_accumulation_steps,
        epochs=args.epochs,
        precision="bf16" if args.mixed_precision == "bf16" else "fp32",
        ema_decay=EMA_DECAY if args.ema else None,
        compile=args.compile,
        seed=args.global_seed,
        log_every=args.log_every,
        checkpoint_every=args.ckpt_every,
        keep_best=False,
        tensorboard=False,
        reconstruction_loss=args.reconstruction_loss,
        reconstruction_weight=args.reconstruction_weight,
        perceptual="vgg" if args.perceptual_weight > 0 else "none",
        perceptual_weight=args.perceptual_weight,
        perceptual_weights=args.perceptual_weights,
        codebook_weight=args.codebook_weight,
        disc_start=args.disc_start,
        disc_weight=args.disc_weight,
    )


def model_config(args: argparse.Namespace) -> TokenizerConfig:
    """As the checkpoint has it, where one is given; else as the flags say."""
    settings = {"commit_loss_beta": args.commit_loss_beta, "dropout_p": args.dropout_p, "image_size": args.image_size}
    if args.vq_ckpt is not None:
        return tokenizer_config(checked_tokenizer(args, args.image_size).config, **settings)
    return tokenizer_config(
        args.vq_model,
        codebook_size=int(args.codebook_size),
        codebook_embed_dim=int(args.codebook_embed_dim),
        **settings,
    )


def perceptual_loss(config: TokenizerTrainConfig) -> PerceptualLoss | None:
    """LPIPS with VGG16's weights; InputError where they are not to be found."""
    if config.perceptual == "none":
        return None
    path = Path(config.perceptual_weights or Path(torch.hub.get_dir()) / "checkpoints" / VGG16)
    if not path.is_file():
        raise InputError(
            f"Expected VGG16's weights for the perceptual loss at {path}, found none: put torchvision's {VGG16} there, "
            "name a file with --perceptual-weights, or train without with --perceptual-weight 0."
        )
    return PerceptualLoss(path, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)


def train(args: argparse.Namespace) -> int:
    """The whole run; 0, or 130 where Ctrl-C ended it."""
    check(args)
    with joined("auto") as world:
        model = world.together(lambda: model_config(args))
        config = config_of(args, model)
        with memory_advice(config):
            return _train(args, config, world)


def _train(args: argparse.Namespace, config: TokenizerTrainConfig, world: World) -> int:
    if world.device.type == "cuda":  # as upstream
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images = world.together(lambda: ImageFolder(args.data_path))
    perceptual = world.together(lambda: perceptual_loss(config))
    source = world.together(lambda: VqSource(args.vq_ckpt, finetune=args.finetune) if args.vq_ckpt else None)
    places: Folders = world.on_main(lambda: ddp_folders(argparse.Namespace(**vars(args), gpt_model=args.vq_model)))
    log = Log(places.experiment if world.main else None)
    log.info(f"Experiment directory created at {places.experiment}")
    log.info(f"Experiment directory created in cloud at {places.checkpoints[-1]}")
    log.info(f"{plain(args)}")
    log.info(f"Starting rank={world.rank}, seed={config.seed}, world_size={world.size}.")
    seed_everything(config.seed)
    model = VQTokenizer(config.model).to(world.device)
    log.info(f"VQ Model Parameters: {sum(p.numel() for p in model.parameters()):,}")
    log.info(f"Dataset contains {len(images):,} images ({args.data_path})")
    steps = total_steps(args, len(images))
    task = UpstreamTokenizerTask(
        model,
        config,
        images,
        steps=steps,
        perceptual=None if perceptual is None else perceptual.to(world.device),
        world=world,
        workers=max(1, min(args.num_workers, default_workers() // world.local_size)),
        log=log,
    )
    if task.discriminator is not None:
        log.info(f"Discriminator Parameters: {sum(p.numel() for p in task.discriminator.parameters()):,}")
    seed_process(config.seed, world.rank)
    store = VqStore(places, args, world, log, source)
    if source is not None:
        if not source.resumes:  # the loop takes what it goes on with
            world.together(lambda: source.into(task))
        log.info(f"Resume training from checkpoint: {source.path}")
        log.info(f"Initial state: steps={source.steps}, epochs={source.steps * config.batch_size // len(images)}")
    log.info(f"Training for {args.epochs} epochs...")
    result = loop.run_as(config, task, store, steps=steps, max_minutes=None, progress=silent)
    if result.reason == "finished":
        log.info("Done!")
    else:
        log.info(f"Stopped at step {result.step} of {result.steps}; --vq-ckpt {store.last} goes on.")
    return 130 if result.reason == "interrupted" else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; the exit code."""
    return exit_code(lambda: train(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
