"""End to end: codes, pixels and PNGs in memory, beside the same codes alone. Does the decoder keep up?"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from retinar.bench.sampling_sizes import TO_PNG
from retinar.engine import images as files
from retinar.engine.pipeline import Sampled
from retinar.engine.tokenizer import VQTokenizer

if TYPE_CHECKING:
    from retinar.bench.sampling import Job, Sampling


def jobs(bench: Sampling) -> Iterator[Job]:
    """One: more images than there is room for at once, so that some are decoded while others are drawn."""
    from retinar.bench.sampling import Job

    waves = -(-bench.size.to_png // bench.size.slots)
    yield Job(TO_PNG, bench.size.to_png, bench.guess(bench.size.slots, 2 * waves), lambda: to_png(bench))


def to_png(bench: Sampling) -> None:
    """The same requests twice: to codes, and through the sampler's pipeline to PNGs in memory.

    ``alone_seconds``: of the codes alone; ``kept_up``: its share of the time with pixels and PNGs, 1.0 if they cost
    nothing. What is decoded after the last code is in it.
    """
    size = bench.size
    with torch.device(bench.device):
        tokenizer = VQTokenizer(size.tokenizer_config)
    sampler = bench.sampler(tokenizer=tokenizer)
    requests = bench.requests(sampler, size.to_png)
    sampler.decode(torch.zeros(size.config.block_size, dtype=torch.int64))  # libraries choose their kernels
    limits: dict[str, Any] = {"max_images": size.slots, "page_size": size.page_size}
    alone = _seconds(sampler.sample_codes(requests, **limits), size.to_png)
    whole = _seconds(sampler.sample(requests, **limits, finish=encode), size.to_png)
    bench.rows.append(
        {
            "name": "sampling",
            "direction": "forward",
            "backend": TO_PNG,
            "baseline": False,
            "model": size.model,
            "tokenizer": size.tokenizer,
            "images": size.to_png,
            "slots": size.slots,
            "codes": size.config.block_size,
            "dtype": str(size.dtype).removeprefix("torch."),
            "seconds": whole,
            "images_per_s": size.to_png / whole,
            "alone_seconds": alone,
            "alone_images_per_s": size.to_png / alone,
            "kept_up": alone / whole,
            "peak_bytes": torch.cuda.max_memory_allocated() if bench.device == "cuda" else None,
            "share": None,
        }
    )


def encode(sampled: Sampled) -> int:
    """The bytes of a PNG in memory, compressed as `images.save_png` does."""
    memory = io.BytesIO()
    files.to_pil(sampled.pixels_HWC, sampled.fields).save(memory, format="PNG", compress_level=6)
    return memory.tell()


def _seconds(made: Iterable[object], count: int) -> float:
    """To get everything out of an iterator whose warm-up is behind it. RuntimeError unless so many come."""
    began = time.perf_counter()
    found = sum(1 for _ in made)
    if found != count:
        raise RuntimeError(f"{count} images were asked for, {found} came")
    return time.perf_counter() - began
