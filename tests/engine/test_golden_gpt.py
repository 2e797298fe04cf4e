"""The transformer against numbers that LlamaGen's own code produced from the same weights, on every backend."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retinar.engine.checkpoint import load_gpt
from retinar.engine.model import GPT, to_upstream_state_dict
from retinar.kernels import ops
from tests.conftest import Ran, every_backend

FILES = ("gpt_ddp.pt", "gpt_consolidated.pth")
LOGITS = 1e-4  # absolute, on logits of standard deviation 2: the vectors' own tolerance

BACKENDS = every_backend("reference", "native", "sdpa")


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "gpt_expected.safetensors")


def load(golden: Path, file: str = FILES[0]) -> GPT:
    return load_gpt(golden / file, golden / "gpt_config.json")


@BACKENDS
def test_logits(golden: Path, expected: Mapping[str, Tensor], ran: Ran) -> None:
    logits_BNV = load(golden)(expected["tokens"], expected["labels"], attention_backend=ran.attention)
    assert logits_BNV.dtype == torch.float32
    torch.testing.assert_close(logits_BNV, expected["train_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("file", FILES)
def test_logits_of_every_file_and_mode(golden: Path, expected: Mapping[str, Tensor], file: str) -> None:
    """The files hold one model, and without dropout the modes agree."""
    for model in (load(golden, file).train(), load(golden, file)):
        logits_BNV = model(expected["tokens"], expected["labels"])
        torch.testing.assert_close(logits_BNV, expected["train_logits"], rtol=0, atol=LOGITS)


@BACKENDS
def test_prefixes_give_the_same_logits(golden: Path, expected: Mapping[str, Tensor], ran: Ran) -> None:
    """Position j sees nothing after code j - 1."""
    model = load(golden)
    for count in (1, 2, 17):
        logits_BNV = model(expected["tokens"][:, :count], expected["labels"], attention_backend=ran.attention)
        torch.testing.assert_close(logits_BNV, expected["train_logits"][:, :count], rtol=0, atol=LOGITS)


@BACKENDS
def test_greedy_codes_have_the_largest_logits(golden: Path, expected: Mapping[str, Tensor], ran: Ran) -> None:
    """Upstream's greedy codes, fed back whole: at every position the next one is the guided argmax."""
    model = load(golden)
    settings = list(itertools.product((1.0, 1.5, 4.0), (-1, 5)))
    if ran.backend == "triton":  # interpreted slowly, and the settings only mix what the model gives
        settings = [(1.5, 5)]
    for scale, interval in settings:
        name = f"greedy.cfg{scale}.interval{interval}"
        codes_BN, labels_B = expected[name], expected["labels"]
        nobody_B = torch.full_like(labels_B, model.config.num_classes)
        with torch.no_grad():
            logits_RNV = model(codes_BN.repeat(2, 1), torch.cat([labels_B, nobody_B]), attention_backend=ran.attention)
        given_BNV, null_BNV = logits_RNV.chunk(2)
        # as in retinar.engine.request: with an interval, the first code and that many decode steps more are guided
        guided_N = torch.arange(codes_BN.shape[1]) < interval + 2 if interval >= 0 else torch.tensor(True)
        mixed_BNV = torch.where(guided_N[..., None], null_BNV + scale * (given_BNV - null_BNV), given_BNV)
        assert torch.equal(mixed_BNV.argmax(-1), codes_BN), name


def check_loss_and_gradients(model: GPT, expected: Mapping[str, Tensor], attention: str | None = None) -> None:
    loss = model.loss(expected["tokens"], expected["labels"], attention_backend=attention)
    torch.testing.assert_close(loss, expected["train_loss"][0], rtol=1e-6, atol=0)
    loss.backward()
    gradients = to_upstream_state_dict({key: parameter.grad for key, parameter in model.named_parameters()})
    wanted = {key.removeprefix("grad."): tensor for key, tensor in expected.items() if key.startswith("grad.")}
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        error = (gradients[key] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, f"{key}: relative to its largest entry {error:.1e}"


@BACKENDS
def test_loss_and_every_gradient(golden: Path, expected: Mapping[str, Tensor], ran: Ran) -> None:
    check_loss_and_gradients(load(golden).train(), expected, ran.attention)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(
    golden: Path, expected: Mapping[str, Tensor], recompute: Literal["selective", "full"]
) -> None:
    model = load(golden).train()
    model.activation_checkpointing = recompute
    check_loss_and_gradients(model, expected)


@BACKENDS
def test_five_adamw_steps(golden: Path, expected: Mapping[str, Tensor], ran: Ran) -> None:
    """Losses, gradient norms and final weights of upstream's optimizer settings, in the packed layout."""
    training = load_file(golden / "gpt_training.safetensors")
    model = load(golden).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    losses, norms = [], []
    for _ in range(5):
        loss = model.loss(expected["tokens"], expected["labels"], attention_backend=ran.attention)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), training["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(norms), training["grad_norm"], rtol=1e-5, atol=0)
    final = to_upstream_state_dict(model.state_dict())
    wanted = {key.removeprefix("final."): tensor for key, tensor in training.items() if key.startswith("final.")}
    assert final.keys() == wanted.keys()
    for key, tensor in wanted.items():
        error = final[key] - tensor
        # Adam divides a gradient by its own size, so where it is near zero rounding shows: single entries may differ by
        # a tenth of one step (lr), all together by a thousandth.
        assert error.abs().max() < 1e-4, f"{key}: largest {error.abs().max():.1e}"
        assert error.square().mean().sqrt() < 1e-6, f"{key}: rms {error.square().mean().sqrt():.1e}"


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_cached_decoding(golden: Path, expected: Mapping[str, Tensor], slots: int) -> None:
    """Teacher-forced steps over a paged cache, rows = conditional then null, pages dealt in a scrambled order."""
    model = load(golden)
    tokens_BN = expected["tokens"].repeat(2, 1)
    rows, count = tokens_BN.shape
    labels_B = torch.cat([expected["labels"], torch.full((rows // 2,), model.config.num_classes)])
    pages = -(-count // slots)
    order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(0))
    table_BM = order.reshape(rows, pages).to(torch.int32)
    shape = (model.config.n_layer, rows * pages, slots, model.config.kv_heads, model.config.head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    images = rows // 2
    for position in range(count):
        inputs = ops.StepInputs(
            tokens_B=labels_B if position == 0 else tokens_BN[:, position - 1].contiguous(),
            positions_B=torch.full((rows,), position, dtype=torch.int32),
            block_table_BM=table_BM,
            cond_row_I=torch.arange(images, dtype=torch.int32),
            null_row_I=torch.arange(images, rows, dtype=torch.int32),
            cfg_scale_I=torch.ones(images),
            temperature_I=torch.ones(images),
            top_k_I=torch.ones(images, dtype=torch.int32),
            top_p_I=torch.ones(images),
            seed_I=torch.zeros(images, dtype=torch.int64),
            index_I=torch.arange(images),
        )
        codes_I, logits_BV = ops.decode_step(model.decode_weights(), k_cache, v_cache, inputs)
        torch.testing.assert_close(logits_BV, expected["cached_logits"][:, position], rtol=0, atol=LOGITS)
        # Scale 1 and top-k 1: the draw is the conditional argmax.
        assert torch.equal(codes_I, logits_BV[:images].argmax(-1))
