"""A few steps in the middle of a decode, for what would take too long from the first code to the last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retinar.bench.steps import Steps, timed_steps
from retinar.engine.kv_cache import KVCache, pages_for
from retinar.engine.runner import Runner
from retinar.engine.step_batch import front
from retinar.kernels import ops

WARM_UP = 2


def middle(block_size: int, window: int) -> int:
    """The position of a window's first step, so that its mean is that of all."""
    return max(0, (block_size - window) // 2)


def place(
    inputs: ops.StepInputs, position: int, block_size: int, page_size: int, vocab_size: int, scale: float
) -> None:
    """Fill step inputs in place: guided pairs, all at one position, each row with pages of its own, codes at random."""
    rows, images = inputs.tokens_B.shape[0], inputs.cond_row_I.shape[0]
    device = inputs.tokens_B.device
    width = pages_for(block_size, page_size)
    table_BM = torch.arange(rows * width, dtype=torch.int32, device=device).view(rows, width)
    inputs.block_table_BM.copy_(table_BM)
    inputs.positions_B.fill_(position)
    generator = torch.Generator().manual_seed(position)
    codes_I = torch.randint(vocab_size, (images,), generator=generator)
    inputs.tokens_B.copy_(codes_I.repeat(2))
    image_I = torch.arange(images, dtype=torch.int32, device=device)
    inputs.cond_row_I.copy_(image_I)
    inputs.null_row_I.copy_(image_I + images)
    inputs.cfg_scale_I.fill_(scale)
    inputs.index_I.copy_(image_I)


def fill(cache: KVCache) -> None:
    """Random keys and values: an empty cache would be read faster than a full one."""
    for each in (cache.k_LPSGD, cache.v_LPSGD):
        each.normal_()


@torch.inference_mode()
def runner_window(runner: Runner, images: int, window: int, scale: float, device: str) -> Steps:
    """Steps of a runner around the mean position, after `WARM_UP`, in a cache with ``2 * images`` rows of pages."""
    config, cache = runner.config, runner.cache
    first = middle(config.block_size, window)
    fill(cache)
    inputs = front(runner.buffers(images), images, 2 * images)
    place(inputs, max(0, first - WARM_UP), config.block_size, cache.page_size, config.vocab_size, scale)
    return Steps(timed_steps(advancing(runner.step, inputs), window, device, warm_up=min(first, WARM_UP)), first)


def advancing(step: Callable[[ops.StepInputs], Tensor], inputs: ops.StepInputs) -> Callable[[], None]:
    """A call that makes a step and gives its codes to the next."""

    def advance() -> None:
        inputs.tokens_B.copy_(step(inputs).repeat(2))
        inputs.positions_B.add_(1)

    return advance
