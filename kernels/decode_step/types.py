"""What a decode step takes: the model's weights, and the state of the live rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class DecodeWeights(NamedTuple):
    """A model's weights as the decode step wants them: one floating dtype, no gradients. Lists have one entry a layer.

    E is the model's width, G the key-value heads, D = E / n_head the head dim, F the feed-forward width.
    """

    cls_embedding_CD: Tensor  # [classes + 1, E]
    tok_embedding_VD: Tensor  # [V, E]
    attention_norm: list[Tensor]  # [E]
    wqkv: list[Tensor]  # [(n_head + 2 * n_kv_head) * D, E]: q, k, v
    wo: list[Tensor]  # [E, n_head * D]
    ffn_norm: list[Tensor]  # [E]
    w13: list[Tensor]  # [2 * F, E]: gate (w1), up (w3)
    w2: list[Tensor]  # [E, F]
    norm_D: Tensor  # [E]
    output_VD: Tensor  # [V, E]
    n_head: int
    n_kv_head: int
    eps: float
    rope_NC2: Tensor  # fp32 [positions, D // 2, 2]


class StepInputs(NamedTuple):
    """The live rows of one step, and the images that draw a code from them.

    An image's rows are ``cond_row`` and ``null_row`` (-1: unguided). The step that reads the token at position p draws
    code p: the class token, at position 0, draws code 0.

    Rows that nobody draws from may fill up a batch: token 0 at position 0, all of them with one page that is no live
    row's. They write equal numbers into its first slot, and no row's bits change.
    """

    tokens_B: Tensor  # int64: the class label where positions_B is 0, else the previous code
    positions_B: Tensor  # int32: position of the input token in its sequence
    block_table_BM: Tensor  # int32: the rows' pages
    cond_row_I: Tensor  # int32
    null_row_I: Tensor  # int32
    cfg_scale_I: Tensor  # fp32
    temperature_I: Tensor  # fp32
    top_k_I: Tensor  # int32, 0 = off
    top_p_I: Tensor  # fp32, 1 = off
    seed_I: Tensor  # int64
    index_I: Tensor  # int64


def flatten(weights: DecodeWeights, caches_LPSGD: tuple[Tensor, Tensor], inputs: StepInputs) -> tuple[Any, ...]:
    """The arguments of the op, in the order of its schema."""
    return *weights, *caches_LPSGD, *inputs


def unflatten(args: tuple[Any, ...]) -> tuple[DecodeWeights, tuple[Tensor, Tensor], StepInputs]:
    """Weights, key and value caches, inputs, out of the arguments of the op."""
    count = len(DecodeWeights._fields)
    return DecodeWeights(*args[:count]), (args[count], args[count + 1]), StepInputs(*args[count + 2 :])
