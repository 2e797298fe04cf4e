"""The weights of a decode step as a GGUF file of architecture ``llama``, for llama.cpp.

It holds what a step reads: every matrix, the norms and the table of codes, not that of the classes. The rotary pairs
lie as llama.cpp turns them, (2i, 2i + 1), but it turns them by one position where we turn them by a row and a column:
the same work, other logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retinar.engine.config import GPTConfig
from retinar.kernels import ops

BF16, Q8_0 = "BF16", "Q8_0"
BYTES = {BF16: 2.0, Q8_0: 34 / 32}
"""A number of a matrix; Q8_0 is int8 with an fp16 scale for each 32 along a row."""
PACKAGE = "gguf"


def missing() -> bool:
    """Whether the package that writes GGUF files is not there."""
    return find_spec(PACKAGE) is None


def write(path: Path, weights: ops.DecodeWeights, config: GPTConfig, kind: str) -> Path:
    """Matrices in ``kind``, norms in fp32, one tensor after another: nothing is held twice."""
    import gguf
    from gguf.quants import quant_shape_to_byte_shape, quantize

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    types = {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType[kind]}
    for name, tensor in named(weights):
        raw, shape = types[tensor.dim()], tuple(tensor.shape)
        in_bytes = quant_shape_to_byte_shape(shape, raw)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in named(weights):
            raw = types[tensor.dim()]
            if raw.name == BF16 and tensor.dtype == torch.bfloat16:
                data = tensor.contiguous().view(torch.uint8).numpy()
            else:
                data = quantize(tensor.float().contiguous().numpy(), raw)
            writer.write_tensor_data(data)
    finally:
        writer.close()
    return path


def named(weights: ops.DecodeWeights) -> Iterator[tuple[str, Tensor]]:
    """Matrices [outputs, inputs] and norms [width], under llama.cpp's names."""
    yield "token_embd.weight", weights.tok_embedding_VD
    yield "output_norm.weight", weights.norm_D
    yield "output.weight", weights.output_VD
    head_dim = weights.tok_embedding_VD.shape[1] // weights.n_head
    widths = [each * head_dim for each in (weights.n_head, weights.n_kv_head, weights.n_kv_head)]
    for layer, wqkv in enumerate(weights.wqkv):
        parts = {
            "attn_norm": weights.attention_norm[layer],
            **dict(zip(("attn_q", "attn_k", "attn_v"), wqkv.split(widths), strict=True)),
            "attn_output": weights.wo[layer],
            "ffn_norm": weights.ffn_norm[layer],
            **dict(zip(("ffn_gate", "ffn_up"), weights.w13[layer].chunk(2), strict=True)),
            "ffn_down": weights.w2[layer],
        }
        for name, tensor in parts.items():
            yield f"blk.{layer}.{name}.weight", tensor
