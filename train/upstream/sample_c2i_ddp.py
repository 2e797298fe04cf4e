"""LlamaGen's ``autoregressive/sample/sample_c2i_ddp.py``: images of random classes for an evaluation.

torchrun --nproc_per_node=8 -m retinar.train.upstream.sample_c2i_ddp --vq-ckpt CKPT --gpt-ckpt CKPT --gpt-model GPT-B
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np

from retinar.engine import images, provenance
from retinar.engine.config import GPT_SIZES
from retinar.engine.errors import InputError
from retinar.engine.pipeline import Sampled
from retinar.engine.progress import Progress, plain, silent
from retinar.engine.request import Request, SamplingParams
from retinar.train.loop import say
from retinar.train.patience import apart, patient
from retinar.train.upstream.flags import Flags, exit_code, refuse
from retinar.train.upstream.gpt_sampler import EvalSampler, load_sampler
from retinar.train.upstream.sample_files import png, remove_leftovers, write_npz
from retinar.train.upstream.vq_flags import Default, add_tokenizer_flags, check_size, image_size
from retinar.train.world import World, joined


def parser() -> Flags:
    """LlamaGen's flags with its defaults."""
    flags = Flags("sample_c2i_ddp", "Images of random classes: PNG files and an .npz for the evaluation.")
    add = flags.add_argument
    add("--gpt-model", choices=list(GPT_SIZES), default="GPT-B")
    add("--gpt-ckpt", default=None, help="LlamaGen's transformer (a file, or an FSDP folder), or a folder of ours")
    add("--gpt-type", choices=["c2i", "t2i"], default="c2i", help="t2i is refused")
    add("--from-fsdp", action="store_true", help="a bare dict of weights (which is seen without it, too)")
    add("--cls-token-num", type=int, default=1, help="1")
    add("--precision", choices=["none", "fp16", "bf16"], default="bf16", help="fp16 is refused")
    add("--compile", action="store_true", default=True, help="changes nothing: the step is compiled or captured anyway")
    add_tokenizer_flags(flags, required=False)
    add("--image-size", type=image_size, default=384)
    add("--image-size-eval", type=image_size, default=256, help="what images are resized to")
    add("--downsample-size", type=int, choices=[8, 16], default=16)
    add("--num-classes", type=int, default=Default(1000))
    add("--cfg-scale", type=float, default=1.5)
    add("--cfg-interval", type=float, default=-1)
    add("--sample-dir", default="samples")
    add("--per-proc-batch-size", type=int, default=32, help="images made at once by each process; changes no image")
    add("--num-fid-samples", type=int, default=50000)
    add("--global-seed", type=int, default=0)
    add("--top-k", type=int, default=0)
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=1.0)
    return flags


def check(args: argparse.Namespace) -> SamplingParams:
    """How codes are drawn; InputError for flags that cannot be met."""
    if args.gpt_ckpt is None:
        refuse("a transformer", "no --gpt-ckpt", "give LlamaGen's file or a folder of ours")
    if args.vq_ckpt is None:
        refuse("a tokenizer", "no --vq-ckpt", "give LlamaGen's file or a folder of ours")
    if args.gpt_type != "c2i":
        refuse("--gpt-type c2i", args.gpt_type, "text-conditional models are sampled with LlamaGen itself")
    if args.cls_token_num != 1:
        refuse("--cls-token-num 1", str(args.cls_token_num), "a class is one token; leave the flag out")
    if args.precision == "fp16":
        refuse("--precision bf16 or none", "fp16", "bf16 takes as little memory and cannot overflow")
    for name in ("per_proc_batch_size", "num_fid_samples"):
        if getattr(args, name) < 1:
            refuse(f"--{name.replace('_', '-')} of at least 1", str(getattr(args, name)), "ask for some images")
    check_size(args.vq_model, args.image_size)
    interval = args.cfg_interval
    if not (interval <= -1 or interval >= 0):
        refuse("--cfg-interval of -1 or from 0 up", str(interval), "-1 guides all codes")
    # Upstream compares the number of each step with it: 2.5 guides as many as 2.
    return SamplingParams(
        args.cfg_scale,
        args.temperature,
        args.top_k,
        args.top_p,
        math.floor(min(interval, 1e9)) if interval >= 0 else -1,
    )


def folder_name(args: argparse.Namespace) -> str:
    """The folder that LlamaGen would write to, in --sample-dir."""
    path = Path(args.gpt_ckpt)
    if not args.from_fsdp:
        checkpoint = path.name.replace(".pth", "").replace(".pt", "")
    else:
        checkpoint = path.name if path.is_dir() else path.absolute().parent.name
    return (
        f"{args.gpt_model}-{checkpoint}-size-{args.image_size}-size-{args.image_size_eval}-{args.vq_model}-"
        f"topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-"
        f"cfg-{args.cfg_scale}-seed-{args.global_seed}"
    )


def sample(args: argparse.Namespace, params: SamplingParams, world: World, progress: Progress = plain) -> Path:
    """Make the images that are missing, then the .npz; the folder."""
    world = patient(world)
    sampler = world.together(lambda: load_sampler(args, world))
    folder = Path(args.sample_dir) / folder_name(args)
    requests = world.together(lambda: random_requests(sampler, params, args.global_seed, args.num_fid_samples))

    def claim() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        say(f"Saving .png samples at {folder}")

    world.on_main(claim)
    mine = requests[world.rank :: world.size]
    apart(world, lambda: _make(sampler, folder, mine, args, progress if world.main else silent))

    def complete() -> None:
        size = args.image_size_eval
        path = write_npz(folder, len(requests), size)
        say(f"Saved .npz file to {path} [shape=({len(requests)}, {size}, {size}, 3)].")

    world.on_main(complete)
    return folder


def random_requests(sampler: EvalSampler, params: SamplingParams, seed: int, count: int) -> list[Request]:
    """Images 0 to ``count`` - 1 of classes that depend on (seed, index) alone, as the images themselves do."""
    sampler.requests([0], params, seed)  # refuses what cannot be, before a million draws
    classes = sampler.config.num_classes
    return sampler.requests(
        [int(np.random.default_rng([seed, index]).integers(classes)) for index in range(count)], params, seed
    )


def _make(
    sampler: EvalSampler, folder: Path, requests: Sequence[Request], args: argparse.Namespace, progress: Progress
) -> None:
    with ThreadPoolExecutor() as pool:
        whole = pool.map(lambda request: _is_whole(sampler, folder, request), requests)
        missing = [request for request, is_whole in zip(requests, whole, strict=True) if not is_whole]

    def save(done: Sampled) -> None:
        images.save_png(images.to_pil(done.pixels_HWC, done.fields), png(folder, done.request.index))

    at_once = args.per_proc_batch_size
    try:
        with closing(sampler.sample(missing, max_images=at_once, progress=progress, finish=save)) as saved:
            for _ in saved:
                pass
    except OSError as error:
        raise InputError(
            f"Expected to write images in {folder}, found {error}: make room or fix the disk, then run the same "
            "command again."
        ) from error


def _is_whole(sampler: EvalSampler, folder: Path, request: Request) -> bool:
    """Whether the image is there, as this call would make it."""
    file = png(folder, request.index)
    if not file.exists():
        return False
    try:
        found = provenance.read(file)
    except InputError:
        return False
    wanted = provenance.expected(sampler.origin, request)
    same = all(found.fields[name] == value for name, value in wanted.items())
    return same and found.untouched and found.pixels_HWC.shape == (sampler.eval_size, sampler.eval_size, 3)


def main(argv: Sequence[str] | None = None) -> int:
    """Sample as the flags say; the exit code."""

    def work() -> int:
        args = parser().parse_args(argv)
        params = check(args)
        with joined("auto") as world:
            sample(args, params, world)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
