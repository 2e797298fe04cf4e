"""LlamaGen's training step, for the process that runs it from a user's clone: ``python upstream_training.py CLONE``.

It imports nothing of ours, and of the clone its transformer; ours and theirs never share a process. A line of JSON in,
a line of JSON out:

in:  {"do": "make", "device", "precision": "bf16" or "fp32", "model": arguments of its ModelArgs, "images", "compile",
      "threads"}: a model, its optimizer, and one step
out: {"loss": of that step, "parameters", "warm_up_seconds": making and compiling it}
in:  {"do": "turn", "steps", "uncounted": steps before them}
out: {"seconds": mean of a step, "cpu_seconds": of all threads, "loss": of the last, "peak_bytes": on CUDA, else null}
     (to either also {"error": a sentence})

The step is that of its train_c2i.py, its defaults where the line names none: fused AdamW on fp32 weights (1e-4, betas
0.9 and 0.95, decay 0.05 on matrices), autocast, gradients clipped to a norm of 1, a scaler that is off, the whole model
through torch.compile inside DDP (of one process), the loss read after each step. Codes and labels are random and stay
on the host, as from its loader.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Loop:
    """The step around ``model``, whose forward takes (idx, cond_idx, targets) and gives (logits, loss).

    ``wrapped``: inside DDP, as upstream runs it also on one GPU; the process group must be there.
    """

    def __init__(
        self,
        model: nn.Module,
        codes_BN: torch.Tensor,
        labels_B: torch.Tensor,
        *,
        device: str,
        precision: str,
        compiled: bool,
        wrapped: bool,
    ) -> None:
        self.device, self.codes_BN, self.labels_B = device, codes_BN, labels_B
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        matrices = [each for each in model.parameters() if each.requires_grad and each.dim() >= 2]
        others = [each for each in model.parameters() if each.requires_grad and each.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        run: Any = torch.compile(model) if compiled else model
        if wrapped:
            run = DistributedDataParallel(
                run, device_ids=[torch.device(device).index or 0] if device == "cuda" else None
            )
        self.model = run.train()
        self.scaler = torch.amp.GradScaler(device, enabled=False)

    def step(self) -> float:
        """One step; its loss."""
        codes_BN = self.codes_BN.to(self.device, non_blocking=True)
        labels_B = self.labels_B.to(self.device, non_blocking=True)
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            _, loss = self.model(cond_idx=labels_B, idx=codes_BN[:, :-1], targets=codes_BN)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def turn(self, steps: int, uncounted: int) -> dict[str, Any]:
        """The mean time of some steps, after some that are not counted; memory is given back for who comes next."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = float("nan")
        for _ in range(uncounted):
            loss = self.step()
        synchronize(self.device)
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = self.step()
        synchronize(self.device)
        seconds, cpu_seconds = (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps
        peak = None
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "peak_bytes": peak}


def random_batch(images: int, model: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [images, block_size] and labels that nothing can be learned from but themselves."""
    generator = torch.Generator().manual_seed(0)
    codes_BN = torch.randint(model["vocab_size"], (images, model["block_size"]), generator=generator)
    return codes_BN, torch.randint(model["num_classes"], (images,), generator=generator)


def make(gpt: Any, job: dict[str, Any]) -> tuple[Loop, dict[str, Any]]:
    """The loop around the clone's model, compiled and warm, and the answer."""
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    model = gpt.Transformer(gpt.ModelArgs(**job["model"])).to(job["device"])
    codes_BN, labels_B = random_batch(job["images"], job["model"])
    loop = Loop(
        model,
        codes_BN,
        labels_B,
        device=job["device"],
        precision=job["precision"],
        compiled=job["compile"],
        wrapped=True,
    )
    loss = loop.step()
    synchronize(job["device"])
    parameters = sum(each.numel() for each in model.parameters())
    return loop, {"loss": loss, "parameters": parameters, "warm_up_seconds": time.perf_counter() - began}


def main(clone: str) -> int:
    """Answer until the input ends. Replies go to the real stdout; whatever the clone prints goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    sys.path[0] = clone  # in place of this script's folder
    warnings.simplefilter("ignore", FutureWarning)  # of torch, at each of its steps
    # As its training script does.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    loop: Loop | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["do"] == "make":
                loop = None  # its memory first
                if not torch.distributed.is_initialized():
                    backend = "nccl" if job["device"] == "cuda" else "gloo"
                    torch.distributed.init_process_group(
                        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
                    )
                loop, reply = make(importlib.import_module("autoregressive.models.gpt"), job)
            elif loop is None:
                reply = {"error": "there is no model to step"}
            else:
                reply = loop.turn(job["steps"], job["uncounted"])
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
        print(json.dumps(reply), file=replies, flush=True)
    return 0


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
