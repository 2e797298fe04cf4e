"""Images from codes on a CPU: VQ-8 at 256 px in fp32 and by the bfloat16 decoder: ``python -m retinar.bench.images``.

Random weights, which amplify rounding more than trained ones do, and random codes. One image at a time, the two
decoders turn by turn: on a shared machine only what was measured together can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retinar.engine.config import tokenizer_config
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.vq_decoder import BFloat16Decoder, ImageDecoder, bfloat16_pays

FP32, BF16 = "fp32", "bf16"
MODEL = "VQ-8"
PEAK = 2.0
"""From black to white, as images are decoded: [-1, 1]."""
ABSENT = "this CPU has no bfloat16 products that torch uses: images are decoded in fp32"


class Size(NamedTuple):
    """``fields`` differ from the model's. At least ``least`` images of each decoder, then more within ``seconds``."""

    fields: Mapping[str, Any]
    seconds: float
    least: int = 3


SIZES = {"cpu": Size({}, 16.0), "exercise": Size({"ch": 32, "image_size": 32}, 0.0, least=2)}


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def psnr(mean_squared_error: float) -> float:
    """dB; infinite where nothing differs."""
    return math.inf if mean_squared_error == 0 else 10 * math.log10(PEAK**2 / mean_squared_error)


@torch.no_grad()
def measured(say: Callable[[str], None] = to_stderr, *, exercise: bool = False) -> dict[str, Any]:
    """{"model", "pixels" a side, "threads", "rows", "absent"} of this machine; takes about half a minute.

    A row: "backend" fp32 or bf16, "images", "image_p50", "image_min" and "image_max" in seconds, "psnr" in dB of all
    images against fp32's (fp32: None), "threads" of torch. What this CPU would not use is absent, with its "reason".
    """
    size = SIZES["exercise" if exercise else "cpu"]
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    tokenizer = VQTokenizer(tokenizer_config(MODEL, **size.fields)).eval()
    config = tokenizer.config
    say(f"{MODEL}, {config.image_size} px, {threads} threads: decoding images")
    decoders: dict[str, ImageDecoder] = {FP32: tokenizer}
    absent: list[dict[str, str]] = []
    if exercise or bfloat16_pays():
        decoders[BF16] = BFloat16Decoder(tokenizer)
    else:
        absent.append({"backend": BF16, "reason": ABSENT})
        say(f"  {BF16}: absent, {ABSENT}")

    generator = torch.Generator().manual_seed(1)
    grid = config.image_size // config.downsample
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    squares: dict[str, list[float]] = {name: [] for name in decoders}
    began = time.perf_counter()
    while len(seconds[FP32]) <= size.least or time.perf_counter() - began < size.seconds:
        codes_1hw = torch.randint(config.codebook_size, (1, grid, grid), generator=generator)
        truth_BCHW: Tensor | None = None
        for name, decoder in decoders.items():
            start = time.perf_counter()
            made_BCHW = decoder.decode(codes_1hw)
            seconds[name].append(time.perf_counter() - start)
            truth_BCHW = made_BCHW if truth_BCHW is None else truth_BCHW
            squares[name].append(float((made_BCHW.double() - truth_BCHW.double()).square().mean()))

    rows = []
    for name in decoders:
        times = seconds[name][1:]  # the first warms up
        row: dict[str, Any] = {
            "backend": name,
            "threads": threads,
            "images": len(times),
            "image_p50": statistics.median(times),
            "image_min": min(times),
            "image_max": max(times),
            "psnr": None if name == FP32 else psnr(statistics.mean(squares[name])),
        }
        rows.append(row)
        told = "" if row["psnr"] is None else f", {row['psnr']:.1f} dB against {FP32}"
        say(f"  {name}: {row['image_p50']:.3f} s an image (fastest {row['image_min']:.3f} s){told}")
    return {"model": MODEL, "pixels": config.image_size, "threads": threads, "rows": rows, "absent": absent}


def main(argv: Sequence[str]) -> int:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m retinar.bench.images", description=__doc__, allow_abbrev=False)
    parser.add_argument("--exercise", action="store_true", help="all of it at a tiny size; its times say nothing")
    print(json.dumps(measured(exercise=parser.parse_args(argv).exercise)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
