"""The config of an upstream file from what it shows: the shapes of its weights and the flags of the run that wrote it.

Two things no weight shows: how ``dim`` is cut into heads (a known size tells, otherwise 64 numbers a head are taken),
and the grid, which the flags tell or the user must.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from retinar.engine.config import (
    GPT_SIZES,
    ConfigSource,
    GPTConfig,
    TokenizerConfig,
    build_gpt_config,
    build_tokenizer_config,
    gpt_fields,
    tokenizer_fields,
)
from retinar.engine.errors import InputError

Shapes = Mapping[str, Tensor]

# gpt_model is not among them: layers and dim show the size, and a fork's own names would be unknown here.
_FLAGS = ("image_size", "downsample_size", "drop_path_rate", "token_dropout_p", "dropout_p")


def infer_gpt_config(
    config: ConfigSource | GPTConfig | None, weights: Shapes, args: Mapping[str, Any], where: str
) -> GPTConfig:
    """What ``config`` states, and for the rest what upstream-layout ``weights`` and ``args`` show.

    ``config`` may be partial (``{"grid": 24}``). Raises InputError, naming ``where``, when grid or heads stay open.
    """
    if isinstance(config, GPTConfig):
        return config
    stated = {} if config is None else gpt_fields(config)
    flags = gpt_fields({key: args[key] for key in _FLAGS if args.get(key) is not None})
    fields = {**_gpt_shapes(weights, where), **flags, **stated}
    named = str(config).lower() in {name.lower() for name in GPT_SIZES}  # a size's name means its 32 codes a side
    if "grid" not in fields and not named:
        raise InputError(
            f"Expected a config with the grid of {where} (no weight shows its grid), found none: "
            'give a size\'s name (grid 32), a JSON file, or at least {"grid": codes per side}.'
        )
    if "n_head" not in fields:
        fields["n_head"] = _heads(fields["n_layer"], fields["dim"], where)
    rows = _rows(weights, "layers.0.attention.wqkv.weight")
    if "n_kv_head" not in fields and rows:
        kv_heads = (rows - fields["dim"]) * fields["n_head"] // (2 * fields["dim"])
        fields["n_kv_head"] = kv_heads if 0 < kv_heads != fields["n_head"] else None
    class_rows = _rows(weights, "cls_embedding.embedding_table.weight")
    if class_rows == fields["num_classes"] and not stated.get("class_dropout_prob"):
        fields |= {"null_class": False, "class_dropout_prob": 0.0}  # trained without class dropout: no null class
    built = build_gpt_config(fields)
    hidden = _rows(weights, "layers.0.feed_forward.w1.weight")
    if "multiple_of" not in stated and hidden and built.ffn_hidden != hidden:
        for multiple_of in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
            built = build_gpt_config({**fields, "multiple_of": multiple_of})
            if built.ffn_hidden == hidden:
                break
    return built


def infer_tokenizer_config(
    config: ConfigSource | TokenizerConfig | None, weights: Shapes, args: Mapping[str, Any], where: str
) -> TokenizerConfig:
    """What ``config`` states, and for the rest what ``weights`` (all but the image size) and ``args`` show."""
    if isinstance(config, TokenizerConfig):
        return config
    stated = {} if config is None else tokenizer_fields(config)
    try:
        shown = _tokenizer_shapes(weights)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"Expected a LlamaGen tokenizer in {where}, found other weights ({error}).") from error
    flags = {"image_size": args["image_size"]} if isinstance(args.get("image_size"), int) else {}
    return build_tokenizer_config({**shown, **flags, **stated})


def _gpt_shapes(weights: Shapes, where: str) -> dict[str, Any]:
    try:
        vocab_size, dim = weights["tok_embeddings.weight"].shape
        class_rows = weights["cls_embedding.embedding_table.weight"].shape[0]
        if not dim:
            raise ValueError("a width of 0")
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"Expected a class-conditional transformer in {where}, found other weights.") from error
    layers = {int(match[1]) for key in weights if (match := re.match(r"layers\.(\d+)\.", key))}
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "n_layer": max(layers, default=-1) + 1,
        "num_classes": class_rows - 1,  # the last is the null class
    }


def _heads(n_layer: int, dim: int, where: str) -> int:
    for size in GPT_SIZES.values():
        if (size["n_layer"], size["dim"]) == (n_layer, dim):
            return size["n_head"]
    if dim % 64:
        raise InputError(f"Expected a config for {where} (dim {dim} is no multiple of 64), found none: state n_head.")
    return dim // 64


def _tokenizer_shapes(weights: Shapes) -> dict[str, Any]:
    ch = weights["encoder.conv_in.weight"].shape[0]
    levels = [key for key in weights if re.fullmatch(r"encoder\.conv_blocks\.\d+\.res\.0\.conv1\.weight", key)]
    blocks = [key for key in weights if re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", key)]
    widths = [weights[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(len(levels))]
    codebook_size, codebook_embed_dim = weights["quantize.embedding.weight"].shape
    return {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "z_channels": weights["quant_conv.weight"].shape[1],
        "codebook_size": codebook_size,
        "codebook_embed_dim": codebook_embed_dim,
        "num_res_blocks": len(blocks),
        "attention": "encoder.mid.1.q.weight" in weights,
    }


def _rows(weights: Shapes, key: str) -> int | None:
    return weights[key].shape[0] if key in weights and weights[key].ndim else None
