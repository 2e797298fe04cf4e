"""Figures of steps: percentiles, the bytes that a step must read, windows, rows."""

from __future__ import annotations

import time

import pytest
import torch

from retinar.bench import steps, windows
from retinar.bench.sampling_sizes import SIZES
from retinar.bench.steps import Steps
from retinar.engine.config import gpt_config
from retinar.engine.kv_cache import KVCache
from retinar.engine.runner import EagerRunner
from retinar.engine.step_batch import front, step_buffers

XL = gpt_config("GPT-XL")
TINY = SIZES["exercise"].config


def test_percentiles_are_measured_values() -> None:
    found = [float(number) for number in range(1, 101)]
    assert steps.percentile(found[::-1], 50) == 50 and steps.percentile(found, 99) == 99
    assert steps.percentile(found, 100) == 100 and steps.percentile(found, 0) == 1
    assert steps.percentile([3.0], 99) == 3.0 and steps.percentile([1.0, 9.0], 50) == 1.0


def test_the_bytes_of_the_papers_model() -> None:
    """The sheet's: 1.505 GB of weights a step, 184,320 bytes of cache a code and row, 193 GB of cache an image."""
    weights = steps.step_bytes(XL, 0, 0, 2)
    assert weights == pytest.approx(1.505e9, rel=1e-3)
    assert steps.step_bytes(XL, 1, 0, 2) - weights == 2 * 184320
    assert steps.step_bytes(XL, 64, 99, 2) - weights == 64 * 100 * 2 * 184320
    one = steps.decode_bytes(XL, 1, 0, 1024, 2)
    assert one - 1024 * weights == pytest.approx(193e9, rel=5e-3)
    assert steps.decode_bytes(XL, 1, 0, 512, 2) + steps.decode_bytes(XL, 1, 512, 512, 2) == one


def test_a_row_of_whole_images() -> None:
    seconds = [0.5] * 8 + [1.0]
    found = steps.row(Steps(seconds, 0, 5.5), TINY, 2, torch.float32, 1e6, backend="ours", baseline=False)
    assert (found["seconds"], found["extrapolated"], found["steps"]) == (5.5, False, 9)
    assert found["images_per_s"] == 2 / 5.5 and found["positions"] == [0, 9]
    assert (found["step_p50"], found["step_p99"], found["step_mean"]) == (0.5, 1.0, pytest.approx(5 / 9))
    moved = steps.decode_bytes(TINY, 2, 0, 9, 4)
    assert found["bytes"] == moved and found["share"] == pytest.approx(moved / 5.0 / 1e6)


def test_a_row_of_a_window_says_that_the_rest_is_extrapolated() -> None:
    found = steps.row(Steps([0.1, 0.3], 3), TINY, 1, torch.bfloat16, 1e6, backend="other", baseline=True)
    assert found["extrapolated"] and found["steps"] == 2 and found["positions"] == [3, 5]
    assert found["seconds"] == pytest.approx(0.2 * 9)
    assert found["bytes"] == steps.step_bytes(TINY, 1, 3, 2) + steps.step_bytes(TINY, 1, 4, 2)


def test_steps_that_warm_up_are_not_counted() -> None:
    waits = iter([0.2, 0.0, 0.0, 0.01])
    found = steps.timed_steps(lambda: time.sleep(next(waits)), 2, "cpu", warm_up=2)
    assert len(found) == 2 and found[0] < 0.01 <= found[1] < 0.2


def test_a_windows_mean_position_is_that_of_all() -> None:
    for block_size, window in ((1024, 32), (9, 2), (4, 4)):
        first = windows.middle(block_size, window)
        assert abs((first + (window - 1) / 2) - (block_size - 1) / 2) <= 0.5
        assert 0 <= first <= block_size - window


def test_a_window_runs_where_it_says() -> None:
    """Pairs with pages of their own, each step one position on, the codes of one given to the next."""
    images, page_size = 2, 4
    pages = 2 * images * 3
    cache = KVCache(TINY, pages=pages, page_size=page_size, dtype=torch.float32, device=torch.device("cpu"))
    seen: list[tuple[list[int], list[int]]] = []

    class Noting(EagerRunner):
        def __init__(self) -> None:
            self.config, self.cache, self.device = TINY, cache, torch.device("cpu")

        def step(self, inputs):  # type: ignore[no-untyped-def]
            seen.append((inputs.positions_B.tolist(), inputs.tokens_B.tolist()))
            table = inputs.block_table_BM
            assert sorted(table.flatten().tolist()) == list(range(pages))
            assert inputs.null_row_I.tolist() == [2, 3] and inputs.cfg_scale_I.tolist() == [2.5, 2.5]
            return torch.tensor([7, 11]) + len(seen)

    found = windows.runner_window(Noting(), images, 2, 2.5, "cpu")
    assert found.first == 3 and len(found.seconds) == 2 and found.whole is None
    assert [positions for positions, _ in seen] == [[at] * 4 for at in (1, 2, 3, 4)]
    assert [tokens for _, tokens in seen[1:]] == [[8, 12, 8, 12], [9, 13, 9, 13], [10, 14, 10, 14]]
    assert bool(cache.k_LPSGD.abs().sum() > 0), "the window must not read an empty cache"


def test_placed_rows_are_reproducible() -> None:
    made = []
    for _ in range(2):
        buffers = step_buffers(TINY, 4, 12, 2, torch.device("cpu"))
        windows.place(front(buffers, 2, 4), 5, 9, 4, 64, 2.0)
        made.append(buffers.tokens_B.tolist())
    assert made[0] == made[1] and made[0][:2] == made[0][2:]
