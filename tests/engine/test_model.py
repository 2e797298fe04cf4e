"""What golden vectors cannot show: dropouts, replay, initialisation, dtypes, packing, devices."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinar.engine.config import GPT_SIZES, GPTConfig, gpt_config
from retinar.engine.errors import InputError
from retinar.engine.model import GPT, DropPath, Recompute, from_upstream_state_dict, to_upstream_state_dict
from retinar.kernels import ops

PLAIN = GPTConfig(
    n_layer=2,
    n_head=4,
    dim=32,
    multiple_of=16,
    vocab_size=48,
    num_classes=3,
    grid=4,
    token_dropout_p=0.0,
    resid_dropout_p=0.0,
    ffn_dropout_p=0.0,
    class_dropout_prob=0.0,
)


def build(seed: int = 0, **changes: object) -> GPT:
    """A small transformer whose weights all matter, in training mode."""
    torch.manual_seed(seed)
    model = GPT(replace(PLAIN, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def batch(model: GPT, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes_BN = torch.randint(model.config.vocab_size, (rows, model.config.block_size), generator=generator)
    return codes_BN, torch.randint(model.config.num_classes, (rows,), generator=generator)


@pytest.mark.parametrize("name", sorted(GPT_SIZES))
def test_every_size_has_the_counted_parameters(name: str) -> None:
    config = gpt_config(name)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameter_count


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT(replace(PLAIN, dim=256, vocab_size=512))
    for name, parameter in model.named_parameters():
        if name == "output.weight":
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = pytest.approx(0.02, rel=0.15 if name.startswith("cls") else 0.03)
            assert parameter.std().item() == expected, name
    codes_BN, labels_B = batch(model)
    assert model.loss(codes_BN, labels_B).item() == pytest.approx(math.log(512), abs=1e-5)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = build()
    codes_BN, labels_B = batch(model)
    logits_BNV = model(codes_BN, labels_B)
    expected = torch.nn.functional.cross_entropy(logits_BNV.flatten(0, 1), codes_BN.flatten())
    torch.testing.assert_close(model.loss(codes_BN, labels_B), expected, rtol=1e-6, atol=0)


def test_the_class_position_has_no_rotation_but_zeros() -> None:
    model = build()
    rope_NC2 = model.rope_NC2
    assert rope_NC2.shape == (17, 4, 2) and rope_NC2.dtype == torch.float32
    assert not rope_NC2[0].any()
    assert torch.equal(rope_NC2[1], torch.tensor([[1.0, 0.0]] * 4))  # code 0 sits at row 0, column 0
    # The class reaches the logits all the same, through its value and its residual.
    codes_BN, labels_B = batch(model)
    assert not torch.allclose(model(codes_BN, labels_B), model(codes_BN, (labels_B + 1) % 3), atol=1e-2)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(kv_heads: int) -> None:
    grouped, full = build(n_kv_head=kv_heads), build()
    with torch.no_grad():
        for small, large in zip(grouped.layers, full.layers, strict=True):
            q, k, v = small.attention.wqkv.weight.split([32, 8 * kv_heads, 8 * kv_heads])
            k, v = (x.unflatten(0, (kv_heads, 8)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1) for x in (k, v))
            large.attention.wqkv.weight.copy_(torch.cat([q, k, v]))
    rest = {key: value for key, value in grouped.state_dict().items() if "wqkv" not in key}
    full.load_state_dict(rest, strict=False)
    inputs = batch(full)
    torch.testing.assert_close(grouped(*inputs), full(*inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}, {"n_kv_head": 1}, {"n_head": 2, "dim": 40}, {"n_layer": 1}])
def test_decode_steps_give_the_logits_of_forward(changes: dict[str, int]) -> None:
    model = build(**changes).eval()
    config = model.config
    codes_BN, labels_B = batch(model)
    expected = model(codes_BN, labels_B).detach()
    rows, slots = len(labels_B), 5
    table_BM = torch.arange(rows * 4, dtype=torch.int32).view(4, rows).T.contiguous()
    shape = (config.n_layer, rows * 4, slots, config.kv_heads, config.head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    each = torch.arange(rows, dtype=torch.int32)
    for position in range(config.block_size):
        inputs = ops.StepInputs(
            tokens_B=labels_B if position == 0 else codes_BN[:, position - 1].contiguous(),
            positions_B=torch.full((rows,), position, dtype=torch.int32),
            block_table_BM=table_BM,
            cond_row_I=each,
            null_row_I=torch.full((rows,), -1, dtype=torch.int32),
            cfg_scale_I=torch.ones(rows),
            temperature_I=torch.ones(rows),
            top_k_I=torch.zeros(rows, dtype=torch.int32),
            top_p_I=torch.ones(rows),
            seed_I=torch.zeros(rows, dtype=torch.int64),
            index_I=each.long(),
        )
        _, logits_BV = ops.decode_step(model.decode_weights(), k_cache, v_cache, inputs)
        torch.testing.assert_close(logits_BV, expected[:, position], rtol=0, atol=2e-5)


def test_class_dropout_uses_the_null_class() -> None:
    model = build(class_dropout_prob=0.5)
    codes_BN, labels_B = batch(model, rows=64)
    torch.manual_seed(3)
    dropped_B = torch.rand(64) < 0.5
    torch.manual_seed(3)
    logits_BNV = model(codes_BN, labels_B)
    assert 10 < dropped_B.sum() < 54
    expected = model.eval()(codes_BN, torch.where(dropped_B, 3, labels_B))
    torch.testing.assert_close(logits_BNV, expected, rtol=0, atol=1e-5)


def test_without_null_class_there_is_no_row_for_it() -> None:
    assert build(null_class=False).cls_embedding.embedding_table.weight.shape == (3, 32)


DROPOUTS = {
    "token": {"token_dropout_p": 0.3},
    "residual": {"resid_dropout_p": 0.3},
    "feed-forward": {"ffn_dropout_p": 0.3},
    "attention": {"attn_dropout_p": 0.3},
    "class": {"class_dropout_prob": 0.5},
    "path": {"drop_path_rate": 0.5},
    "all": {"token_dropout_p": 0.1, "resid_dropout_p": 0.1, "ffn_dropout_p": 0.1, "attn_dropout_p": 0.1},
}


@pytest.mark.parametrize("changes", DROPOUTS.values(), ids=DROPOUTS.keys())
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_dropouts_replay_from_the_generator_state(changes: dict[str, float], checkpointing: Recompute) -> None:
    """The same state gives the same loss and gradients to the bit, with and without recomputation; another does not."""
    model = build(**changes)
    inputs = batch(model, rows=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def gradients(recompute: Recompute) -> list[Tensor]:
        torch.set_rng_state(state)
        model.activation_checkpointing = recompute
        model.zero_grad()
        loss = model.loss(*inputs)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    first = gradients("none")
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(checkpointing), strict=True))
    assert not torch.equal(model.loss(*inputs), first[0])  # the stream has moved on
    model.eval()
    assert torch.equal(model.loss(*inputs), model.loss(*inputs))


def test_attention_dropout_keeps_the_mean() -> None:
    """Dropped probabilities are made up for: the expected attention output is the undropped one."""
    model = build(n_layer=1, attn_dropout_p=0.25)
    attention = model.layers[0].attention
    x_BNX = torch.randn(1, 16, 32)
    rope_NC2 = model.rope_NC2[:16]
    clean = attention(x_BNX, rope_NC2, None, None)
    drawn = torch.stack([attention(x_BNX, rope_NC2, torch.tensor(seed), None) for seed in range(100)])
    error = (drawn.mean(0) - clean) / (drawn.std(0) / 10 + 1e-6)
    assert drawn.std(0).max() > 0.01
    assert error.square().mean() < 2  # in units of the standard error


def test_stochastic_depth_grows_and_replaces_dropouts() -> None:
    model = build(n_layer=5, drop_path_rate=0.4, resid_dropout_p=0.1, ffn_dropout_p=0.1, token_dropout_p=0.1)
    assert [block.drop_path.rate for block in model.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert {block.attention.resid_dropout.p for block in model.layers} == {0.0}
    assert {block.feed_forward.ffn_dropout.p for block in model.layers} == {0.0}
    assert model.tok_dropout.p == 0.1


def test_drop_path_drops_samples_whole() -> None:
    torch.manual_seed(0)
    branch = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert (branch == branch[:, :1, :1]).all()
    assert branch.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert branch.mean().item() == pytest.approx(1, abs=0.05)


def test_bf16_autocast_stays_close_and_returns_fp32() -> None:
    model = build()
    inputs = batch(model)
    exact = model(*inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits_BNV, loss = model(*inputs), model.loss(*inputs)
    assert logits_BNV.dtype == loss.dtype == torch.float32
    error = (logits_BNV - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 2e-2  # bf16 arithmetic did happen, and cost what bf16 costs
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_a_cast_model_keeps_its_rotary_table() -> None:
    model = build()
    table_NC2 = model.rope_NC2.clone()
    model.to(torch.bfloat16)
    assert model.output.weight.dtype == torch.bfloat16
    assert model.rope_NC2.dtype == torch.float32 and torch.equal(model.rope_NC2, table_NC2)
    assert model(*batch(model)).dtype == torch.float32


def test_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = GPT(PLAIN)
    assert model.output.weight.is_meta and model.rope_NC2.is_meta
    model.to_empty(device="cpu").init_weights()
    assert torch.equal(model.rope_NC2, GPT(PLAIN).rope_NC2)
    assert model.loss(*batch(model)).item() == pytest.approx(math.log(48), abs=1e-5)


@given(layers=st.integers(1, 3), hidden=st.integers(1, 9), prefix=st.sampled_from(["", "module.", "_orig_mod.module."]))
@settings(max_examples=20, deadline=None)
def test_packing_round_trip(layers: int, hidden: int, prefix: str) -> None:
    packed = {f"layers.{i}.feed_forward.w13.weight": torch.randn(2 * hidden, 4) for i in range(layers)}
    packed |= {f"layers.{i}.feed_forward.w2.weight": torch.randn(4, hidden) for i in range(layers)}
    plain = to_upstream_state_dict(packed)
    assert len(plain) == 3 * layers and not any("w13" in key for key in plain)
    dressed = {prefix + key: tensor for key, tensor in plain.items()} | {"freqs_cis": torch.ones(1)}
    back = from_upstream_state_dict(dressed)
    assert back.keys() == packed.keys()
    assert all(torch.equal(back[key], packed[key]) for key in packed)
    assert from_upstream_state_dict(packed).keys() == packed.keys()


def test_unlike_halves_are_refused() -> None:
    weights = {"layers.0.feed_forward.w1.weight": torch.ones(2, 3), "layers.0.feed_forward.w3.weight": torch.ones(3, 3)}
    with pytest.raises(InputError, match=r"w1.weight and .*w3.weight of one shape"):
        from_upstream_state_dict(weights)


def test_decode_weights_share_or_cast() -> None:
    model = build(n_kv_head=2)
    weights = model.decode_weights()
    assert isinstance(weights, ops.DecodeWeights)
    assert weights.w13[1].data_ptr() == model.layers[1].feed_forward.w13.weight.data_ptr()
    assert (weights.n_head, weights.n_kv_head, weights.eps) == (4, 2, 1e-5)
    cast = model.decode_weights(torch.bfloat16)
    assert cast.wqkv[0].dtype == cast.norm_D.dtype == torch.bfloat16
    assert cast.rope_NC2.dtype == torch.float32
    assert not weights.output_VD.requires_grad


def test_copies_are_independent() -> None:
    """EMA keeps a deep copy."""
    model = build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.output.weight.add_(1)
    assert not torch.equal(model.output.weight, twin.output.weight)
    assert torch.equal(twin.eval()(*batch(twin)), twin(*batch(twin)))


@pytest.mark.parametrize(
    ("codes", "labels"), [((2, 17), (2,)), ((2, 0), (2,)), ((16,), (1,)), ((2, 16), (3,)), ((2, 16), (2, 1))]
)
def test_wrong_shapes_are_named(codes: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"Expected codes \[B, N\] with N from 1 to 16"):
        build()(torch.zeros(codes, dtype=torch.int64), torch.zeros(labels, dtype=torch.int64))
