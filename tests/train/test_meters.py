"""FLOPs against torch's own counter and by hand, and what the meters make of time, memory and data."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from retinar.engine.config import GPTConfig, TokenizerConfig, gpt_config
from retinar.engine.model import GPT
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import meters
from retinar.train.config import TokenizerTrainConfig
from retinar.train.flops import TokenizerFlops, gpt_step_flops, vgg16_flops
from retinar.train.meters import METERS, Meters, matmul_flops_per_s

CPU = torch.device("cpu")
SMALL = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, dim=48, multiple_of=32, vocab_size=96, num_classes=2, grid=4)


def counted(config: GPTConfig, images: int) -> dict[str, int]:
    """By torch's counter, of the forward and backward of a model whose attention is products of whole matrices."""
    model = GPT(config)
    codes_BN = torch.randint(config.vocab_size, (images, config.block_size))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits_BNV = model(codes_BN, torch.zeros(images, dtype=torch.int64), attention_backend="sdpa")
        cross_entropy(logits_BNV.flatten(0, 1), codes_BN.flatten()).backward()
    found = counter.get_flop_counts()["Global"]
    return {str(op): flops for op, flops in found.items()}


@pytest.mark.parametrize("groups", [None, 2])
def test_products_attention_and_loss_are_what_torch_counts(groups: int | None) -> None:
    config = GPTConfig(**{**SMALL.to_dict(), "n_kv_head": groups})
    ours, torchs = gpt_step_flops(config, images=5), counted(config, images=5)
    assert set(torchs) == {"aten.mm", "aten.bmm"}
    # With logits as a whole the loss is a product like any other.
    assert ours["matrix products"] + ours["loss"] == torchs["aten.mm"]
    # Two products forward and four backward over the whole square; ours: two and five over the triangle with diagonal.
    positions = config.block_size
    assert ours["attention"] / 7 * 6 * 2 * positions / (positions + 1) == pytest.approx(torchs["aten.bmm"], rel=1e-12)


def test_checkpointing_and_dropout_do_not_count() -> None:
    free = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "attn_dropout_p": 0.0}
    assert gpt_step_flops(GPTConfig(**{**SMALL.to_dict(), **free}), 2) == gpt_step_flops(SMALL, 2)
    assert sum(gpt_step_flops(SMALL, 4).values()) == 2 * sum(gpt_step_flops(SMALL, 2).values())


def test_the_papers_model_by_hand() -> None:
    """GPT-XL on one image: 36 layers, width 1280, 20 heads of 64, feed-forward 3584, 1,024 codes of 16,384."""
    found = gpt_step_flops(gpt_config("GPT-XL"), images=1)
    layer = 1280 * 3840 + 1280 * 1280 + 3 * 1280 * 3584
    assert layer == 20_316_160
    assert found["matrix products"] == 6 * 1024 * 36 * layer == 4_493_609_533_440
    assert found["loss"] == 6 * 1024 * 1280 * 16384 == 128_849_018_880
    # q k^T and its use: 2 x 2 x 64 operations for each of 1024 x 1025 / 2 pairs and head; 3.5 times with the backward.
    assert found["attention"] == 36 * 20 * 256 * (1024 * 1025 // 2) * 7 // 2 == 338_558_976_000
    assert found["norms"] == 1024 * (73 * 15 * 1280 + 36 * 2 * 1280 + 73 * 8)
    assert found["gates"] == 36 * 17 * 1024 * 3584
    assert sum(found.values()) / 1024 == pytest.approx(4.848e9, rel=1e-3)  # FLOPs a token


def tokenizer_config(**changes: Any) -> TokenizerTrainConfig:
    model = TokenizerConfig(
        ch=16, ch_mult=(1, 2), z_channels=16, codebook_size=64, image_size=32, num_res_blocks=1, norm_groups=4
    )
    values: dict[str, Any] = {"recipe": "x", "model": model, "batch_size": 2, "perceptual": "none", "disc_weight": 0.0}
    return TokenizerTrainConfig(**{**values, **changes})


def test_a_tokenizers_convolutions_are_counted_as_they_run() -> None:
    config = tokenizer_config()
    search = 2 * 512 * 64 * 8 + 8 * 512 * 8  # 2 images of 16 x 16 codes, and the gradient of the normalisation
    model = VQTokenizer(config.model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(torch.zeros(2, 3, 32, 32))
        (output.reconstruction.sum() + output.codebook_loss + output.commitment_loss).backward()
    state = torch.get_rng_state()
    assert TokenizerFlops(config)(0) == counter.get_total_flops() + search
    assert torch.equal(state, torch.get_rng_state())  # a resumed run counts at another step


def test_a_tokenizers_stages_cost_what_they_add() -> None:
    adversary = {"disc_weight": 0.5, "disc_start": 10, "disc_channels": 8}
    flops = TokenizerFlops(tokenizer_config(**adversary))
    assert flops(8) == TokenizerFlops(tokenizer_config())(0) < flops(9) == flops(10_000)
    late = TokenizerFlops(tokenizer_config(perceptual="vgg", perceptual_from=5, perceptual_side=0.5))
    assert late(5) - late(4) == 3 * 2 * vgg16_flops(16)
    assert TokenizerFlops(tokenizer_config(scope="decoder"))(0) < TokenizerFlops(tokenizer_config())(0)
    crops = TokenizerFlops(tokenizer_config(crop_size=16, model=TokenizerConfig(
        ch=16, ch_mult=(1, 2), z_channels=16, codebook_size=64, image_size=32, num_res_blocks=1, norm_groups=4,
        attention=False,
    )))  # fmt: skip
    assert crops(0) < TokenizerFlops(tokenizer_config())(0) / 3.9
    assert vgg16_flops(224) == pytest.approx(2 * 15.35e9, rel=1e-3)  # as published, in multiply-adds


def test_a_line_has_every_meter() -> None:
    one = Meters(4096, 2e9, CPU, peak_flops=1e10)
    first, second = one.line(seconds=4.0, steps=8), one.line(seconds=4.0, steps=8)
    assert set(first) == set(METERS) and set(METERS) - set(second) == {"matmul_flops_per_s"}
    assert first["tokens_per_s"] == 4096 * 8 / 4 and first["mfu"] == pytest.approx(2e9 * 8 / 4 / 1e10)
    assert first["matmul_flops_per_s"] == 1e10 and first["data_wait"] == 0.0
    assert 50 * 2**20 < first["peak_memory_bytes"] <= second["peak_memory_bytes"]


def test_memory_held_once_stays_in_a_cpus_peak() -> None:
    before = meters.peak_memory_bytes(CPU)
    held = torch.ones(before // 4 + 2**24)  # at least as much again
    assert meters.peak_memory_bytes(CPU) >= before + 2**25
    del held


def test_the_time_inside_data_is_waiting() -> None:
    one = Meters(1, 1.0, CPU, 1.0)
    for _ in range(2):
        with one.data():
            time.sleep(0.02)
    with pytest.raises(StopIteration), one.data():
        time.sleep(0.02)
        raise StopIteration
    assert 0.06 <= one.line(1.0, 2)["data_wait"] < 0.5
    assert one.line(1.0, 2)["data_wait"] == 0.0


def test_flops_of_each_step_are_those_of_its_stage() -> None:
    asked: list[int] = []

    def flops(step: int) -> float:
        asked.append(step)
        return 10.0 if step < 12 else 100.0

    one = Meters(1, flops, CPU, peak_flops=1.0, done=10)
    assert asked == [10]  # what is slow to count is counted before the clock starts
    assert one.line(1.0, 3)["mfu"] == 120.0
    assert one.line(1.0, 1)["mfu"] == 100.0


def test_the_rate_of_products_is_measured_and_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "RATE_SECONDS", 0.0)
    state = torch.get_rng_state()
    rates = [matmul_flops_per_s(CPU, precision, side=256) for precision in ("fp32", "bf16")]
    assert torch.equal(state, torch.get_rng_state())
    assert all(1e7 < rate < 1e14 for rate in rates)
    monkeypatch.setattr(meters, "_seconds", lambda *tensors: next(times))
    monkeypatch.setattr(meters, "RATE_SECONDS", 1.0)
    times, clock = iter([2.0, 0.5, 1.0]), iter([0.0, 0.4, 0.8, 1.2])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    assert matmul_flops_per_s(CPU, "fp32", side=10) == 2 * 10**3 / 0.5
