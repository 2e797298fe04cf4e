"""Step inputs and the independence of a row: equal bits whatever shares the batch, wherever its pages lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinar.engine.config import GPTConfig
from retinar.engine.kv_cache import KVCache
from retinar.engine.model import GPT
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.runner import DecodeLoop, EagerRunner
from retinar.engine.sampler import Sampler
from retinar.engine.scheduler import Scheduler
from retinar.engine.step_batch import StepBatch, step_buffers
from retinar.kernels import ops

CPU = torch.device("cpu")
PARAMS = (
    SamplingParams(),
    SamplingParams(cfg_scale=1.0),
    SamplingParams(cfg_scale=4.0, temperature=0.7, top_k=9),
    SamplingParams(cfg_scale=1.5, cfg_interval=5, top_p=0.8),
)
MIXED = [make_request(index, index % 2, PARAMS[index % 4], seed=3) for index in range(8)]


class Recorder(EagerRunner):
    """Keeps every row's logits under (image index, position, is it the null row)."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.seen: dict[tuple[int, int, bool], Tensor] = {}

    def step(self, inputs: ops.StepInputs) -> Tensor:
        positions_B, logits = inputs.positions_B.tolist(), None
        codes_I = super().step(inputs)
        logits = self.logits_BV
        assert logits is not None
        for index, cond, null in zip(
            inputs.index_I.tolist(), inputs.cond_row_I.tolist(), inputs.null_row_I.tolist(), strict=True
        ):
            self.seen[index, positions_B[cond], False] = logits[cond].clone()
            if null >= 0:
                assert positions_B[null] == positions_B[cond]
                self.seen[index, positions_B[null], True] = logits[null].clone()
        return codes_I


def record(
    gpt: GPT,
    requests: list[Request],
    max_images: int,
    page_size: int,
    pages: int,
    dtype: torch.dtype = torch.float32,
    poison: bool = False,
) -> tuple[dict[tuple[int, int, bool], Tensor], dict[int, Tensor]]:
    """All logits and codes of a run."""
    cache = KVCache(gpt.config, pages=pages, page_size=page_size, dtype=dtype, device=CPU)
    if poison:
        cache.k_LPSGD.fill_(float("nan"))
        cache.v_LPSGD.fill_(float("nan"))
    runner = Recorder(gpt.decode_weights(dtype), gpt.config, cache)
    loop = DecodeLoop(runner, max_images)
    for request in requests:
        loop.submit(request)
    return runner.seen, {done.request.index: done.codes_T for done in loop.run()}


def check_equal(
    first: tuple[dict[tuple[int, int, bool], Tensor], dict[int, Tensor]],
    second: tuple[dict[tuple[int, int, bool], Tensor], dict[int, Tensor]],
) -> None:
    assert first[0].keys() == second[0].keys() and first[1].keys() == second[1].keys()
    for key, logits_V in first[0].items():
        assert torch.equal(logits_V, second[0][key]), f"logits of (index, position, null) = {key}"
    for index, codes_T in first[1].items():
        assert torch.equal(codes_T, second[1][index]), f"codes of image {index}"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def alone(tiny_gpt: GPT, request: pytest.FixtureRequest) -> tuple:
    """One image at a time, one page a row: the bits that all other arrangements must give."""
    return request.param, record(tiny_gpt, MIXED, 1, 1024, 2, request.param)


@pytest.mark.parametrize("page_size", [1, 16, 1024])
@pytest.mark.parametrize("max_images", [3, 8])
def test_batch_and_page_size_change_no_bit(tiny_gpt: GPT, alone: tuple, max_images: int, page_size: int) -> None:
    dtype, expected = alone
    check_equal(expected, record(tiny_gpt, MIXED, max_images, page_size, 16 * 36, dtype))


def test_order_pool_and_old_memory_change_no_bit(tiny_gpt: GPT, alone: tuple) -> None:
    dtype, expected = alone
    shuffled = [MIXED[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    # 36 codes in pages of 4 are 9 pages a row: 31 hold an image and a half, so most must wait and positions mix
    check_equal(expected, record(tiny_gpt, shuffled, 8, 4, 31, dtype, poison=True))


def test_prefill_beside_decoding_changes_no_bit(tiny_gpt: GPT, alone: tuple) -> None:
    dtype, expected = alone
    cache = KVCache(tiny_gpt.config, pages=400, page_size=2, dtype=dtype, device=CPU)
    runner = Recorder(tiny_gpt.decode_weights(dtype), tiny_gpt.config, cache)
    loop, codes = DecodeLoop(runner, 8), {}
    waiting = list(MIXED)
    while waiting or loop.scheduler.busy:  # one more image every five steps
        if waiting:
            loop.submit(waiting.pop())
        for _ in range(5):
            codes |= {done.request.index: done.codes_T for done in loop.step()}
    check_equal(expected, (runner.seen, codes))


def test_cancelling_leaves_the_others_alone(tiny_gpt: GPT, alone: tuple) -> None:
    dtype, (_, expected) = alone
    cache = KVCache(tiny_gpt.config, pages=60, page_size=4, dtype=dtype, device=CPU)
    loop, codes = DecodeLoop(EagerRunner(tiny_gpt.decode_weights(dtype), tiny_gpt.config, cache), 4), {}
    tickets = [loop.submit(request) for request in MIXED]
    for step in range(400):
        if step == 7:
            assert loop.cancel(tickets[1]) and loop.cancel(tickets[6])
        codes |= {done.request.index: done.codes_T for done in loop.step()}
    assert codes.keys() == {0, 2, 3, 4, 5, 7}
    for index, codes_T in codes.items():
        assert torch.equal(codes_T, expected[index])
    assert loop.step() == [] and loop.scheduler.allocator.free == 60


def test_step_inputs_are_what_the_scheduler_says(tiny_gpt: GPT) -> None:
    scheduler = Scheduler(36, 16, 60, max_images=4)
    for request in MIXED[:4]:
        scheduler.submit(request)
    scheduler.admit()
    batch = StepBatch(tiny_gpt.config, step_buffers(tiny_gpt.config, 16, 60, 4, CPU))
    batch.rebuild(scheduler.live, null_class=2)
    inputs = batch.inputs
    assert inputs.tokens_B.tolist() == [0, 1, 0, 1, 2, 2, 2]  # four labels, the null class of three
    assert inputs.positions_B.tolist() == [0] * 7
    assert inputs.cond_row_I.tolist() == [0, 1, 2, 3] and inputs.null_row_I.tolist() == [4, -1, 5, 6]
    assert inputs.cfg_scale_I.tolist() == [2.0, 1.0, 4.0, 1.5]
    assert inputs.top_k_I.tolist() == [0, 0, 9, 0]
    assert inputs.seed_I.tolist() == [3] * 4 and inputs.index_I.tolist() == [0, 1, 2, 3]
    # the null row of the last needs 7 slots: one page, the rest of its table is never read
    used = [3, 3, 3, 3, 3, 3, 1]
    pages = [page for row, count in zip(inputs.block_table_BM.tolist(), used, strict=True) for page in row[:count]]
    assert len(set(pages)) == len(pages) == 60 - scheduler.allocator.free
    for name, dtype in (("tokens_B", torch.int64), ("positions_B", torch.int32), ("block_table_BM", torch.int32)):
        assert getattr(inputs, name).dtype == dtype

    batch.record(torch.tensor([10, 11, 12, 13]))
    assert batch.inputs.tokens_B.tolist() == [10, 11, 12, 13, 10, 12, 13]
    assert batch.inputs.positions_B.tolist() == [1] * 7


def test_a_rebuild_in_flight_keeps_codes_and_addresses(tiny_gpt: GPT) -> None:
    scheduler = Scheduler(36, 16, 60, max_images=4)
    for request in MIXED[:2]:
        scheduler.submit(request)
    scheduler.admit()
    batch = StepBatch(tiny_gpt.config, step_buffers(tiny_gpt.config, 16, 60, 4, CPU))
    batch.rebuild(scheduler.live, null_class=2)
    address = [tensor.data_ptr() for tensor in batch.inputs]
    for code in (20, 30):
        batch.record(torch.tensor([code, code + 1]))
        scheduler.advance()
    scheduler.submit(MIXED[2])
    scheduler.admit()
    batch.rebuild(scheduler.live, null_class=2)
    assert batch.inputs.tokens_B.tolist() == [30, 31, 0, 30, 2]
    assert batch.inputs.positions_B.tolist() == [2, 2, 0, 2, 0]
    assert [tensor.data_ptr() for tensor in batch.inputs] == address
    assert batch.take(scheduler.live[1].slot)[:2].tolist() == [21, 31]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=6), st.integers(0, 12), st.integers(0, 3))
def test_what_lies_behind_the_live_rows_is_padding(gone: list[int], steps: int, late: int) -> None:
    """After any arrivals, steps and cancellations: rows that a padded step runs must touch nobody's pages."""
    config = GPTConfig(n_layer=1, n_head=1, dim=4, multiple_of=4, vocab_size=8, num_classes=2, grid=3)
    scheduler = Scheduler(9, 4, 30, max_images=4)
    buffers, padding = (step_buffers(config, 4, 30, 4, CPU) for _ in range(2))
    batch = StepBatch(config, buffers)
    for request in MIXED[: 8 - late]:
        scheduler.submit(request)
    for step in range(steps):
        scheduler.admit()
        batch.rebuild(scheduler.live, null_class=2)
        rows, images = len(batch.inputs.tokens_B), len(scheduler.live)
        for name, tensor in buffers._asdict().items():
            used = images if name.endswith("_I") else rows
            assert torch.equal(tensor[used:], getattr(padding, name)[used:]), name
        owned = {page for image in scheduler.live for page in (*image.cond_pages, *image.null_pages)}
        assert set(batch.inputs.block_table_BM.flatten().tolist()) <= owned | {30}
        batch.record(torch.zeros(images, dtype=torch.int64))
        scheduler.advance()
        for ticket in gone[step : step + 1]:
            scheduler.cancel(ticket)


def test_top_k_of_all_codes_is_off(tiny_gpt: GPT) -> None:
    scheduler = Scheduler(36, 16, 60, max_images=1)
    scheduler.submit(make_request(0, 0, SamplingParams(top_k=64)))
    scheduler.admit()
    batch = StepBatch(tiny_gpt.config, step_buffers(tiny_gpt.config, 16, 60, 1, CPU))
    batch.rebuild(scheduler.live, null_class=2)
    assert batch.inputs.top_k_I.tolist() == [0]


def test_the_cached_step_agrees_with_the_training_forward(tiny_gpt: GPT, tiny_sampler: Sampler) -> None:
    request = make_request(0, 1, SamplingParams(cfg_scale=1.0), seed=5)
    seen, codes = record(tiny_gpt, [request], 1, 4, 9)
    logits_NV = torch.stack([seen[0, position, False] for position in range(36)])
    with torch.no_grad():
        expected_BNV = tiny_gpt(codes[0][None], torch.tensor([1]))
    torch.testing.assert_close(logits_NV, expected_BNV[0], atol=1e-4, rtol=1e-4)
