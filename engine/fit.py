"""Whether weights fit a model, and what to say when they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from retinar.engine.errors import InputError
from retinar.engine.upstream import from_upstream_state_dict, to_upstream_state_dict


def fill(model: nn.Module, weights: Mapping[str, Tensor], where: Path | str) -> None:
    """Give a model on the meta device its weights, in either layout, without copying them all.

    Raises InputError that names unknown and missing keys, or the first tensor of another shape; ``where`` is the file.
    """
    expected, weights = to_upstream_state_dict(model.state_dict()), to_upstream_state_dict(weights)
    unknown, missing = weights.keys() - expected.keys(), expected.keys() - weights.keys()
    if unknown or missing:
        parts = [_list("unknown", weights, unknown), _list("missing", expected, missing)]
        raise InputError(
            f"Expected the weights of this config in {where}, found {' and '.join(filter(None, parts))} keys: "
            "check the number of layers or levels in the config."
        )
    for key, tensor in expected.items():
        kinds = tensor.is_floating_point(), weights[key].is_floating_point()
        if kinds[0] != kinds[1] or weights[key].layout != torch.strided:
            raise InputError(
                f"Expected {key} as plain {'floating point' if kinds[0] else 'whole'} numbers, found "
                f"{weights[key].dtype} ({weights[key].layout}) in {where}: give another file."
            )
        if tensor.shape != weights[key].shape:
            raise InputError(
                f"Expected {key} of shape {list(tensor.shape)}, found {list(weights[key].shape)} in {where}: "
                f"correct {_cause(key)} in the config."
            )
    model.load_state_dict(from_upstream_state_dict(weights), assign=True)


def _list(what: str, order: Iterable[str], keys: set[str]) -> str:
    first = [key for key in order if key in keys][:3]
    if not first:
        return ""
    return f"{len(keys)} {what} ({', '.join(first)}{', …' if len(keys) > len(first) else ''})"


def _cause(key: str) -> str:
    causes = {
        "cls_embedding": "num_classes or dim",
        "tok_embeddings": "vocab_size or dim",
        "output": "vocab_size or dim",
        "quantize": "codebook_size or codebook_embed_dim",
        "quant_conv": "z_channels or codebook_embed_dim",
        "post_quant_conv": "z_channels or codebook_embed_dim",
        "encoder": "ch, ch_mult or z_channels",
        "decoder": "ch, ch_mult or z_channels",
    }
    if "feed_forward" in key:
        return "dim or multiple_of"
    return causes.get(key.split(".")[0], "dim, n_head or n_kv_head")
