"""What a measured step starts from: rows at one position, and a cache that has been written."""

from __future__ import annotations

import torch

from retinar.bench.decoding_sizes import DecodingSize
from retinar.bench.sampling_sizes import CFG_SCALE
from retinar.engine.config import GPTConfig
from retinar.engine.kv_cache import KVCache, pages_for
from retinar.kernels import ops


def step_inputs(config: GPTConfig, images: int, position: int, page_size: int) -> ops.StepInputs:
    """Guided pairs, all at one position, each row with pages of its own, codes at random."""
    rows, width = 2 * images, pages_for(position + 1, page_size)
    image_I = torch.arange(images, dtype=torch.int32)
    generator = torch.Generator().manual_seed(position)
    return ops.StepInputs(
        tokens_B=torch.randint(config.vocab_size, (images,), generator=generator).repeat(2),
        positions_B=torch.full((rows,), position, dtype=torch.int32),
        block_table_BM=torch.arange(rows * width, dtype=torch.int32).view(rows, width),
        cond_row_I=image_I,
        null_row_I=image_I + images,
        cfg_scale_I=torch.full((images,), CFG_SCALE),
        temperature_I=torch.ones(images),
        top_k_I=torch.zeros(images, dtype=torch.int32),
        top_p_I=torch.ones(images),
        seed_I=torch.zeros(images, dtype=torch.int64),
        index_I=image_I.long(),
    )


def on_one_page(inputs: ops.StepInputs, position: int, page_size: int) -> ops.StepInputs:
    """The same rows early in their images: they read their last page alone, at its last slot, which no step at
    ``position`` reads before it has written it."""
    early_B = torch.full_like(inputs.positions_B, min(position, page_size - 1))
    return inputs._replace(positions_B=early_B, block_table_BM=inputs.block_table_BM[:, -1:].contiguous())


def filled_cache(
    config: GPTConfig, rows: int, size: DecodingSize, dtype: torch.dtype, like: KVCache | None = None
) -> KVCache:
    """Random keys and values, each layer the first's (other memory, and all of them written); or ``like`` in int8."""
    pages, device = rows * pages_for(size.context, size.page_size), torch.device("cpu")
    cache = KVCache(config, pages=pages, page_size=size.page_size, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    for name in ("k", "v"):
        whole = getattr(cache, f"{name}_LPSGD")
        if like is None:
            whole[:] = torch.randn(whole.shape[1:], generator=generator)
            continue
        first = getattr(like, f"{name}_LPSGD")[0].float()
        scale = first.abs().amax(-1, keepdim=True) / 127
        whole[:] = (first / scale).round_().to(dtype)
        getattr(cache, f"{name}_scale_LPSG")[:] = scale[..., 0]
    return cache
