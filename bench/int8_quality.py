"""What int8 costs: the divergence of the next code's distribution, on real codes, from that in bfloat16.

``python -m retinar.bench.int8_quality --model CHECKPOINT --codes CODES``: a transformer's folder, and codes of `retinar
encode` to read along (teacher forcing), so that every precision sees the same past.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from retinar.engine import checkpoint
from retinar.engine.errors import InputError
from retinar.engine.kv_cache import KVCache, pages_for
from retinar.engine.model import GPT
from retinar.engine.precision import PRECISIONS, Precision
from retinar.engine.runner import NativeRunner
from retinar.engine.step_batch import front
from retinar.kernels import ops
from retinar.train.code_files import CodeSet

PAGE_SIZE = 16


def log_probabilities(gpt: GPT, precision: Precision, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
    """fp32 [B, T, V]: of every code given the true ones before it, by the compiled decoder in a precision."""
    runner = make_runner(gpt, precision, len(codes_BT))
    inputs = one_row_an_image(runner, labels_B)
    found = []
    for position in range(gpt.config.block_size):
        runner.step(inputs)
        assert runner.logits_BV is not None
        found.append(runner.logits_BV.log_softmax(-1))
        inputs.tokens_B.copy_(codes_BT[:, position])
        inputs.positions_B.add_(1)
    return torch.stack(found, 1)


def make_runner(gpt: GPT, precision: Precision, rows: int) -> NativeRunner:
    """A runner with room for so many rows."""
    weights = gpt.decode_weights(precision.dtype)
    decoder = ops.NativeDecoder(weights, int8=precision.int8_weights, threads=torch.get_num_threads())
    pages = rows * pages_for(gpt.config.block_size, PAGE_SIZE)
    cpu = torch.device("cpu")
    cache = KVCache(gpt.config, pages=pages, page_size=PAGE_SIZE, dtype=precision.cache_dtype, device=cpu)
    return NativeRunner(decoder, gpt.config, cache)


def one_row_an_image(runner: NativeRunner, labels_B: Tensor) -> ops.StepInputs:
    """The first step of unguided images, each with pages of its own; nothing is drawn."""
    inputs = front(runner.buffers(len(labels_B)), 0, len(labels_B))
    inputs.tokens_B.copy_(labels_B)
    table_BM = inputs.block_table_BM
    table_BM.copy_(torch.arange(table_BM.numel()).view_as(table_BM))
    return inputs


def compare(gpt: GPT, codes_BT: Tensor, labels_B: Tensor) -> dict[str, dict[str, float]]:
    """For each precision against bfloat16 (and that against float32): mean KL in nats, how often the likeliest code is
    the same, and the mean negative log-likelihood of the true codes in nats."""
    kept: dict[str, Tensor] = {}
    result: dict[str, dict[str, float]] = {}
    for name, against in (("float32", None), ("bfloat16", "float32"), ("int8", "bfloat16"), ("int8-cache", "bfloat16")):
        kept[name] = logs = log_probabilities(gpt, PRECISIONS[name], codes_BT, labels_B)
        likelihood = -logs.gather(2, codes_BT[..., None]).mean().item()
        result[name] = {"nll": likelihood}
        if against is not None:
            other = kept[against]
            result[name]["kl"] = (other.exp() * (other - logs)).sum(-1).mean().item()
            result[name]["same_argmax"] = (other.argmax(-1) == logs.argmax(-1)).float().mean().item()
    return result


def main(argv: Sequence[str]) -> int:
    """Prints a line a precision and one of JSON; 2 and a sentence for bad input."""
    parser = argparse.ArgumentParser(prog="python -m retinar.bench.int8_quality", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32)
    flags = parser.parse_args(argv)
    try:
        gpt = checkpoint.load_gpt(flags.model).eval()
        data = CodeSet(flags.codes)
        if data.codes.shape[-1] != gpt.config.block_size:
            raise InputError(
                f"expected {gpt.config.block_size} codes an image, as the transformer has, found "
                f"{data.codes.shape[-1]} in {flags.codes}; give the codes that it was trained on"
            )
        count = min(flags.images, len(data.labels))
        step = max(1, len(data.labels) // count)
        codes_BT = torch.from_numpy(data.codes[::step][:count, 0].astype("int64"))
        labels_B = torch.from_numpy(data.labels[::step][:count].astype("int64"))
        found = compare(gpt, codes_BT, labels_B)
    except (InputError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, line in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in line.items()))
    print(json.dumps({"images": count, "codes": count * gpt.config.block_size, **found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
