"""The engine as a whole: sampling and decoding with a small model of random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from retinar.bench.timing import Timing, measure
from retinar.engine.config import gpt_config, tokenizer_config
from retinar.engine.model import GPT
from retinar.engine.request import SamplingParams
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"gpt": "GPT-tiny", "tokenizer": "VQ-8-tiny", "grid": 8, "codes": 1024, "images": 4},
    # Small, and the host's work with it; `retinar.bench.sampling` has the paper's size.
    "cuda": {"gpt": "GPT-small", "tokenizer": "VQ-8-narrow", "grid": 8, "codes": 4096, "images": 16},
    "exercise": {"gpt": "GPT-tiny", "tokenizer": "VQ-8-tiny", "grid": 2, "codes": 64, "images": 2},
}


class EngineCall(NamedTuple):
    """A call of the engine, with the work that one call does."""

    name: str
    case: str
    call: Callable[[], object]
    images: int


def engine_calls(device: str, size_name: str | None = None) -> list[EngineCall]:
    """Guided sampling of codes, and decoding of codes to pixels, both of several images."""
    size = SIZES[size_name or device]
    grid, codes, images = size["grid"], size["codes"], size["images"]
    torch.manual_seed(0)
    gpt = GPT(gpt_config(size["gpt"], vocab_size=codes, grid=grid, num_classes=2))
    tokenizer = VQTokenizer(tokenizer_config(size["tokenizer"], codebook_size=codes, image_size=8 * grid))
    sampler = Sampler(gpt, tokenizer, device=device)
    requests = sampler.requests([index % 2 for index in range(images)], SamplingParams(2.0, 1.0, 0, 1.0, -1))
    drawn = torch.randint(codes, (images, grid * grid), generator=torch.Generator().manual_seed(0))
    return [
        EngineCall(
            "sample", f"{size['gpt']} {images} guided images", lambda: list(sampler.sample_codes(requests)), images
        ),
        EngineCall(
            "decode", f"{size['tokenizer']} {images} images", lambda: [sampler.decode(row) for row in drawn], images
        ),
    ]


def engine_row(call: EngineCall, timing: Timing) -> dict[str, object]:
    """A line of a result file; no limit beside it: many ops of many sizes are in one call."""
    return {
        "name": call.name,
        "direction": "forward",
        "case": call.case,
        "dtype": "float32",
        "backend": "-",
        "baseline": False,
        "seconds": timing.median,
        "fastest": timing.fastest,
        "slowest": timing.slowest,
        "runs": timing.runs,
        "images_per_s": call.images / timing.median,
        "share": None,
    }


def engine_rows(device: str, size: str, seconds: float) -> list[dict[str, object]]:
    """Every call measured, by the wall clock: the host's work is part of it."""
    rows = []
    for call in engine_calls(device, size):

        def whole(call: EngineCall = call) -> None:
            call.call()
            if device == "cuda":
                torch.cuda.synchronize()

        rows.append(engine_row(call, measure([whole], "cpu", seconds=seconds, least=2)))
    return rows
