"""The process that runs LlamaGen's own sampler from a user's clone: ``python upstream_process.py CLONE``.

It imports nothing of ours, and of the clone its transformer and its generation loop; ours and theirs never share a
process, whose folders have the same names. A line of JSON in, a line of JSON out, one for each measurement:

in:  {"device", "dtype", "model": arguments of its ModelArgs, "images", "cfg_scale", "compile": "" or a mode of
      torch.compile or "aot_eager", "first", "steps", "whole_seconds"}
out: {"seconds": [of each step], "whole": seconds or null, "attention": [...], "peak_bytes", "warm_up_seconds"}, or
     {"error": a sentence}

The steps are those of its generation loop, called one by one, in caches of full length: what they cost does not depend
on the position. Whole images come from its `generate`, where the steps say that this takes at most ``whole_seconds``;
compiled there are none, for each call makes other caches, which may compile it again.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # steps; of compiled ones the first compiles, the second records the graph


def main(clone: str) -> int:
    """Answer until the input ends. Replies go to the real stdout; whatever the clone prints goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    sys.path[0] = clone  # in place of this script's folder
    warnings.simplefilter("ignore", FutureWarning)  # of torch, at each of its steps
    # As its sampling script does.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch.nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    for line in sys.stdin:
        try:
            gpt, generate = (importlib.import_module(f"autoregressive.models.{name}") for name in ("gpt", "generate"))
            reply = measure(gpt, generate, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
        print(json.dumps(reply), file=replies, flush=True)
    return 0


@torch.no_grad()
def measure(gpt: Any, generate: Any, job: dict[str, Any]) -> dict[str, Any]:
    """One measurement; everything is made anew and freed afterwards."""
    device, images, scale = job["device"], job["images"], job["cfg_scale"]
    dtype = getattr(torch, job["dtype"])
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device(device):
        model = gpt.Transformer(gpt.ModelArgs(**job["model"]))
    model.output.weight.normal_(std=0.02)  # it starts as zeros, and products with zeros are faster
    model = model.to(device=device, dtype=dtype).eval()
    block_size, classes = job["model"]["block_size"], job["model"]["num_classes"]
    labels = torch.arange(images, device=device) % classes
    attention = attention_of(model, stepper(model, model, generate, labels, block_size, 1, scale))

    began = time.perf_counter()
    run = compiled(model, job["compile"])
    step = stepper(run, model, generate, labels, block_size, job["first"], scale)
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    warm_up = time.perf_counter() - began
    seconds = times(step, job["steps"], device)

    whole = None
    if not job["compile"] and sum(seconds) / len(seconds) * block_size <= job["whole_seconds"]:
        synchronize(device)
        began = time.perf_counter()
        codes = generate.generate(run, labels, block_size, cfg_scale=scale, temperature=1.0, top_k=0, top_p=1.0)
        synchronize(device)
        whole = time.perf_counter() - began
        assert codes.shape == (images, block_size)
    return {
        "seconds": seconds,
        "whole": whole,
        "attention": attention,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "warm_up_seconds": warm_up,
    }


def stepper(
    run: Any, model: Any, generate: Any, labels: torch.Tensor, block_size: int, first: int, scale: float
) -> Callable[[], None]:
    """A call that makes one step of its loop, set up as its `generate` does, from position ``first``."""
    images, device = labels.shape[0], labels.device
    with torch.device(device):
        model.setup_caches(2 * images, 1 + block_size, dtype=model.tok_embeddings.weight.dtype)
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    token = generate.prefill(run, both, torch.arange(1, device=device), scale, **sampling)
    position = torch.tensor([max(1, first - WARM_UP)], device=device, dtype=torch.int)

    def step() -> None:
        nonlocal token  # decode_n_tokens moves the position on
        tokens, _ = generate.decode_n_tokens(run, token, position, 1, scale, -1, **sampling)
        token = tokens[0].view(-1, 1)

    return step


def compiled(model: Any, mode: str) -> Any:
    """As its sampling script compiles; the exercise takes all of it but the code generator."""
    if not mode:
        return model
    if mode == "aot_eager":
        return torch.compile(model, backend=mode, fullgraph=True)
    return torch.compile(model, mode=mode, fullgraph=True)


def attention_of(model: Any, step: Callable[[], None]) -> list[str]:
    """The kinds of attention that torch may choose from inside a step: the clone's loop sets them."""
    found: list[str] = []

    def note(*_: Any) -> None:
        cuda: Any = torch.backends.cuda
        kinds = ("math", "flash", "mem_efficient", "cudnn")
        found[:] = [kind for kind in kinds if getattr(cuda, f"{kind}_sdp_enabled", lambda: False)()]

    handle = model.register_forward_pre_hook(note)
    step()
    handle.remove()
    return found


def times(step: Callable[[], None], count: int, device: str) -> list[float]:
    """Seconds of each of ``count`` steps."""
    if device != "cuda":
        found = []
        for _ in range(count):
            began = time.perf_counter()
            step()
            found.append(time.perf_counter() - began)
        return found
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [one.elapsed_time(two) / 1e3 for one, two in itertools.pairwise(events)]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
