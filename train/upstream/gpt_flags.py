"""The flags of ``train_c2i.py`` and ``train_c2i_fsdp.py``, and the training config that they mean."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys

from retinar.engine.config import GPT_SIZES, gpt_config
from retinar.train.config import GPTTrainConfig, OptimConfig
from retinar.train.recipes import gpt_recipe
from retinar.train.upstream.flags import Flags, refuse

EMA_DECAY = 0.9999
_OTHER_DATA = ("imagenet", "coco", "openimage", "pexels", "t2i", "t2i_image", "t2i_code")


def gpt_parser(script: str, about: str, *, fsdp: bool) -> Flags:
    """Upstream's flags with its defaults."""
    parser = Flags(script, about)
    add = parser.add_argument
    add("--code-path", required=True, help="holds {dataset}{image-size}_codes and _labels")
    add("--cloud-save-path", required=True, help="checkpoints go here; storage that all machines share")
    add("--no-local-save", action="store_true", help="no checkpoints in --results-dir")
    add("--gpt-model", choices=list(GPT_SIZES), default="GPT-B")
    if fsdp:
        add("--gpt-resume", help="a checkpoint's folder, of any number of processes, or a .pt: goes on with it")
    else:
        add("--gpt-ckpt", help="a .pt or an FSDP folder: goes on with it; without an optimizer in it, starts from it")
    add("--gpt-type", choices=["c2i", "t2i"], default="c2i", help="t2i is refused")
    add("--vocab-size", type=int, default=16384, help="codes of the tokenizer")
    add("--ema", action="store_true", help=f"also average the weights (decay {EMA_DECAY})")
    add("--cls-token-num", type=int, default=1, help="1")
    add("--dropout-p", type=float, default=0.1, help="after attention and feed-forward")
    add("--token-dropout-p", type=float, default=0.1, help="on the embeddings")
    add("--drop-path-rate", type=float, default=0.0, help="stochastic depth; takes the place of --dropout-p")
    add("--no-compile", action="store_true", help="do not torch.compile the blocks")
    add("--results-dir", default="results")
    add("--dataset", default="imagenet_code", help="NAME_code: the folders begin with NAME")
    add("--image-size", type=int, choices=[256, 384, 448, 512], default=256)
    add("--downsample-size", type=int, choices=[8, 16], default=16)
    add("--num-classes", type=int, default=1000)
    add("--epochs", type=int, default=300)
    add("--lr", type=float, default=1e-4)
    add("--weight-decay", type=float, default=5e-2)
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.95)
    add("--max-grad-norm", type=float, default=1.0, help="0: no clipping")
    add("--global-batch-size", type=int, default=256, help="images of a step, over all processes and parts")
    add("--global-seed", type=int, default=0)
    add("--num-workers", type=int, default=24, help="not needed: codes are mapped from one file")
    add("--log-every", type=int, default=100)
    add("--ckpt-every", type=int, default=5000)
    add("--gradient-accumulation-steps", type=int, default=1, help="parts of a step (upstream ignores it)")
    if fsdp:
        add("--mixed-precision", choices=["fp32", "tf32", "fp16", "bf16"], default="bf16", help="fp16 is refused")
        add("--data-parallel", choices=["sdp", "fsdp", "hsdp"], default="fsdp")
        add("--grad-precision", choices=["fp32", "fp16", "bf16"], help="of the sums over processes; as the weights")
        add("--wandb-project", default=None, help="c2i_fsdp")
        add("--no-wandb", action="store_true")
    else:
        add("--mixed-precision", choices=["none", "fp16", "bf16"], default="bf16", help="fp16 is refused")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what ours does not do. InputError with the flag, and what to do instead."""
    if args.gpt_type != "c2i":
        refuse("--gpt-type c2i", args.gpt_type, "text-conditional models are trained with LlamaGen itself")
    if args.cls_token_num != 1:
        refuse("--cls-token-num 1", str(args.cls_token_num), "a class is one token; leave the flag out")
    if args.mixed_precision == "fp16":
        refuse("--mixed-precision bf16 or one of 32 bits", "fp16", "bf16 is as small and needs no loss scaling")
    if not args.dataset.endswith("_code") or args.dataset in _OTHER_DATA:
        refuse("--dataset imagenet_code or another NAME_code", args.dataset, "extract codes first")
    precision = getattr(args, "grad_precision", None)
    if precision == "fp16":
        refuse("--grad-precision fp32 or bf16", "fp16", "leave it out, or take fp32")
    if precision == "bf16" and args.mixed_precision != "bf16":
        refuse(f"--grad-precision fp32 with --mixed-precision {args.mixed_precision}", "bf16", "leave it out")
    if args.max_grad_norm < 0:
        refuse("--max-grad-norm of at least 0", str(args.max_grad_norm), "0 is no clipping")
    parts, processes = args.gradient_accumulation_steps, int(os.environ.get("WORLD_SIZE", "1"))
    if parts < 1 or args.global_batch_size < 1 or args.global_batch_size % (parts * processes):
        refuse(
            f"--global-batch-size as a multiple of {processes} processes x --gradient-accumulation-steps {parts}",
            str(args.global_batch_size),
            "change one of them",
        )


def config_of(args: argparse.Namespace) -> GPTTrainConfig:
    """The config of the flags, on the recipe that holds upstream's defaults. ``steps`` is left to the codes."""
    full_precision = args.mixed_precision != "bf16"
    # Upstream sums gradients in the weights' precision unless told otherwise; DDP always in fp32.
    narrow = getattr(args, "data_parallel", None) is not None and not full_precision and args.grad_precision != "fp32"
    return dataclasses.replace(
        gpt_recipe("llamagen-b"),
        recipe=f"llamagen {args.gpt_model}",
        model=gpt_config(
            args.gpt_model,
            vocab_size=args.vocab_size,
            grid=args.image_size // args.downsample_size,
            num_classes=args.num_classes,
            token_dropout_p=args.token_dropout_p,
            resid_dropout_p=args.dropout_p,
            ffn_dropout_p=args.dropout_p,
            drop_path_rate=args.drop_path_rate,
        ),
        optim=OptimConfig(
            lr=args.lr,
            betas=(args.beta1, args.beta2),
            weight_decay=args.weight_decay,
            grad_clip=args.max_grad_norm or None,
        ),
        batch_size=args.global_batch_size,
        accumulation=args.gradient_accumulation_steps,
        epochs=args.epochs,
        precision="fp32" if full_precision else "bf16",
        reduce_precision="bf16" if narrow else "fp32",
        parallel=getattr(args, "data_parallel", "ddp"),
        ema_decay=EMA_DECAY if args.ema else None,
        compile=not args.no_compile,
        seed=args.global_seed,
        log_every=args.log_every,
        checkpoint_every=args.ckpt_every,
        keep_best=False,
        tensorboard=False,
        wandb=wandb_project(args),
    )


def wandb_project(args: argparse.Namespace) -> str | None:
    """The project to report to. Upstream's launch lines do not name one and mean c2i_fsdp: where W&B is not installed,
    these train without it; a project that was named is insisted on."""
    if getattr(args, "no_wandb", True):
        return None
    if args.wandb_project is not None or importlib.util.find_spec("wandb") is not None:
        return args.wandb_project or "c2i_fsdp"
    if os.environ.get("RANK", "0") == "0":
        print("wandb is not installed: training without it (pip install wandb, or --no-wandb).", file=sys.stderr)
    return None


def uses_tf32(args: argparse.Namespace) -> bool:
    """Whether products of fp32 numbers may be rounded to TF32 on a GPU: upstream always allows it; ours does not where
    fp32 was asked for by name."""
    return args.mixed_precision != "fp32"


def total_steps(args: argparse.Namespace, images: int) -> int:
    """As many as upstream makes: it leaves out what is short of a batch at the end of each epoch."""
    each = images // args.global_batch_size
    return args.epochs * each if each else max(1, args.epochs * images // args.global_batch_size)
