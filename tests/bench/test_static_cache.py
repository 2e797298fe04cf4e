"""The decode step in plain torch that is compiled is the step of the ops, from the same cache."""

from __future__ import annotations

import pytest
import torch

from retinar.bench.baselines import static_cache
from retinar.bench.windows import fill, place
from retinar.engine.config import GPTConfig, gpt_config
from retinar.engine.kv_cache import KVCache
from retinar.engine.model import GPT
from retinar.engine.step_batch import front, step_buffers
from retinar.kernels import ops

SIZE = {"multiple_of": 32, "vocab_size": 101, "num_classes": 3, "grid": 3}
IMAGES, PAGE = 2, 4


def pair(config: GPTConfig, position: int, fused: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(its logits, the reference's, its tokens) at a position."""
    torch.manual_seed(3)
    gpt = GPT(config)
    torch.nn.init.normal_(gpt.output.weight, std=0.2)
    weights = gpt.decode_weights()
    cache = KVCache(config, pages=12, page_size=PAGE, dtype=torch.float32, device=torch.device("cpu"))
    fill(cache)
    inputs = front(step_buffers(config, PAGE, cache.scratch_page, IMAGES, torch.device("cpu")), IMAGES, 2 * IMAGES)
    place(inputs, position, config.block_size, PAGE, config.vocab_size, 2.0)
    if position == 0:
        inputs.tokens_B.copy_(torch.tensor([0, 2, 3, 3]))
    module = static_cache.StaticCacheStep(weights, IMAGES, config.block_size, fused=fused)
    static_cache.copy_cache(module, cache.k_LPSGD, cache.v_LPSGD, inputs.block_table_BM)
    with torch.no_grad():
        tokens_B, logits_BV = module(inputs.tokens_B, torch.tensor([position]), 2.0)
        _, expected_BV = ops.decode_step(weights, cache.k_LPSGD, cache.v_LPSGD, inputs, backend="reference")
    return logits_BV, expected_BV, tokens_B


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1])
@pytest.mark.parametrize("position", [0, 1, 5, 8])
def test_its_logits_are_the_steps(position: int, kv_heads: int | None, fused: bool) -> None:
    config = gpt_config("GPT-tiny", n_layer=2, n_head=2, dim=32, n_kv_head=kv_heads, **SIZE)
    found_BV, expected_BV, tokens_B = pair(config, position, fused)
    assert torch.allclose(found_BV, expected_BV, rtol=1e-4, atol=1e-5)
    assert static_cache.disagrees(found_BV, expected_BV) is None
    assert tokens_B.shape == (4,) and torch.equal(tokens_B[:2], tokens_B[2:]) and int(tokens_B.max()) < 101


def test_another_model_disagrees() -> None:
    config = gpt_config("GPT-tiny", n_layer=1, n_head=2, dim=32, **SIZE)
    found_BV, expected_BV, _ = pair(config, 5)
    assert "differ" in (static_cache.disagrees(found_BV.roll(1, -1), expected_BV) or "")
    assert static_cache.disagrees(found_BV * float("nan"), expected_BV) is not None


def test_draws_follow_the_guided_probabilities() -> None:
    """Chi-square of 4,000 draws with 2.5 of guidance, 9 degrees of freedom: 27.9 is exceeded once in a thousand."""
    config = gpt_config("GPT-tiny", n_layer=1, n_head=2, dim=32, **{**SIZE, "vocab_size": 10})
    torch.manual_seed(5)
    gpt = GPT(config)
    torch.nn.init.normal_(gpt.output.weight, std=0.2)
    images = 4000
    module = static_cache.StaticCacheStep(gpt.decode_weights(), images, 9)
    tokens_B = torch.tensor([1, 3]).repeat_interleave(images)
    with torch.no_grad():
        drawn_B, logits_BV = module(tokens_B, torch.tensor([0]), 2.5)
    cond_V, null_V = logits_BV[0], logits_BV[-1]
    expected_V = (null_V + (cond_V - null_V) * 2.5).softmax(-1) * images
    counts_V = drawn_B[:images].bincount(minlength=10)
    assert float(((counts_V - expected_V).square() / expected_V).sum()) < 27.9
