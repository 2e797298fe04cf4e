"""The paper's model takes a real optimizer step on a small machine (24 GiB, two cores)."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from retinar.engine.model import GPT
from retinar.train import recipes
from retinar.train.code_fit import check_codes
from retinar.train.codes import CodeSet
from retinar.train.config import apply_overrides
from retinar.train.gpt import GPTTask
from retinar.train.rng import seed_everything
from tests.train.tiny import write_codes


@pytest.mark.slow
def test_gpt_xl_takes_a_step(tmp_path: Path) -> None:
    """fundus-xl, one image, activation checkpointing; fp32 weights, gradients and moments: 12.4 GB.

    Attention dropout is off: its reference makes 20 x 1024 x 1024 random words a layer, three times, for many minutes.
    """
    folder = write_codes(tmp_path / "codes", images=2, grid=32, tokenizer_config={"codebook_size": 16384})
    codes = np.random.default_rng(0).integers(0, 16384, size=(2, 2, 1024)).astype(np.uint16)
    np.save(folder / "codes.npy", codes)
    config = apply_overrides(
        recipes.fundus_xl(),
        [
            "model.attn_dropout_p=0",
            "batch_size=1",
            "activation_checkpointing=full",
            "precision=fp32",
            "compile=false",
            "device=cpu",
        ],
    )
    check_codes(config, CodeSet(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seed_everything(0)
        model = GPT(config.model)
        with torch.no_grad():
            # The initial output weight is zero and lets no gradient through; with this one the loss still is ln V.
            model.output.weight.normal_(0.0, 1e-4)
        task = GPTTask(model, config, CodeSet(folder), steps=10)
        before = {name: (p.sum().item(), p.norm().item()) for name, p in model.named_parameters()}
        began = time.monotonic()
        values = {name: float(value) for name, value in task.step(0).items()}
        seconds = time.monotonic() - began
    finally:
        torch.set_num_threads(threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"GPT-XL, one step: {seconds:.0f} s, peak {peak:.1f} GiB, {values}")
    assert sum(p.numel() for p in model.parameters()) == config.model.parameter_count > 773e6
    assert values["loss"] == pytest.approx(math.log(16384), abs=1e-3)
    assert math.isfinite(values["grad_norm"]) and values["grad_norm"] > 0
    for name, p in model.named_parameters():
        after = (p.sum().item(), p.norm().item())
        assert all(map(math.isfinite, after)) and after != before[name], f"{name} did not change"
        assert task.optimizer.state[p]["exp_avg_sq"].any(), f"no gradient reached {name}"
