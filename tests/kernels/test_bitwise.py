"""Bits that must not depend on neighbours: batch size, order, page size, page numbers, number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.decode_step.spec import make_weights
from retinar.kernels.dispatch import interpreting, preferred
from retinar.kernels.numerics import lanewise

BATCHES = (1, 2, 3, 5, 8, 16)
ROWS = max(BATCHES)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"threads{n}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _single_threaded(function: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


ROW_OPS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, torch.Generator], Tensor]]] = {
    "rms_norm": ((1, 7, 100, 257, 1280), lambda x, g: ops.rms_norm(x, torch.ones(x.shape[-1]), backend="reference")),
    "swiglu": ((1, 7, 100, 1001, 2048), lambda x, g: ops.swiglu(x, x.flip(-1), backend="reference")),
    "linear": (
        (1, 33, 100, 384),
        lambda x, g: ops.linear(
            x, torch.randn(77 + x.shape[-1], x.shape[-1], generator=g).to(x.dtype), backend="reference"
        ),
    ),
    "apply_rope": (
        (4, 20, 100),
        lambda x, g: ops.apply_rope(
            x[None, None], ops.rope_table(1, 1, x.shape[-1], cls_tokens=0).expand(ROWS, -1, -1)
        )[0, 0],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROW_OPS)
def test_rows_do_not_depend_on_the_batch(name: str, dtype: torch.dtype, threads: int) -> None:
    widths, op = ROW_OPS[name]

    def run(x: Tensor) -> Tensor:
        return op(x, torch.Generator().manual_seed(1))

    for width in widths:
        x = (torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
        expected = _single_threaded(lambda x=x: torch.cat([run(x[row : row + 1]) for row in range(ROWS)]))
        for batch in BATCHES:
            assert torch.equal(run(x[:batch]), expected[:batch]), (width, batch)
        order = torch.randperm(ROWS)
        assert torch.equal(run(x[order]), expected[order]), width


@pytest.mark.parametrize("function", [torch.exp, torch.log1p, torch.log, torch.nn.functional.silu])
@pytest.mark.parametrize("count", [1, 63, 65, 2047, 2049, 5000, 40001, 100003])
def test_lanewise_bits_do_not_depend_on_the_place(
    function: Callable[[Tensor], Tensor], count: int, threads: int
) -> None:
    """Against the same numbers shifted by one place."""
    grain = 32768 if function is torch.nn.functional.silu else 2048
    x = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    whole, shifted = lanewise(function, x, grain), lanewise(function, x[1:].clone(), grain)
    assert torch.equal(whole[1:], shifted)
    assert torch.equal(whole, _single_threaded(lambda: lanewise(function, x, grain)))


def _paged(
    page: int, rows: list[int], data: dict[str, Tensor], positions: Tensor, dtype: torch.dtype, shuffle: int
) -> Tensor:
    """Runs the chosen rows over a cache of the given page size, pages in a random order, unused slots NaN."""
    groups, dim = data["k"].shape[1:]
    columns = int(positions.max()) // page + 1
    pages = torch.randperm(len(rows) * columns + 3, generator=torch.Generator().manual_seed(shuffle))
    table = pages[: len(rows) * columns].view(len(rows), columns).int()
    caches = [torch.full((len(pages), page, groups, dim), float("nan"), dtype=dtype) for _ in range(2)]
    for at, row in enumerate(rows):
        place = torch.arange(int(positions[row]))
        for cache, past in zip(caches, (data["past_k"], data["past_v"]), strict=True):
            cache[table[at, place // page].long(), place % page] = past[row, : len(place)]
    return ops.paged_attention(
        data["q"][rows], data["k"][rows], data["v"][rows], *caches, table, positions[rows], ops.rope_table(9, 9, dim),
        backend="reference",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(6, 6, 64), (3, 1, 20), (4, 2, 100), (1, 1, 4)])
def test_paged_attention_rows(heads: int, groups: int, dim: int, dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {"q": (heads,), "k": (groups,), "v": (groups,), "past_k": (80, groups), "past_v": (80, groups)}
    data = {k: torch.randn(ROWS, *s, dim, generator=generator).to(dtype) for k, s in shapes.items()}
    positions = torch.tensor([(row * 23) % 80 for row in range(ROWS)], dtype=torch.int32)
    expected = _single_threaded(lambda: torch.cat([_paged(1, [r], data, positions, dtype, 0) for r in range(ROWS)]))
    for page in (1, 5, 16, 1024):
        for batch in BATCHES if page == 16 else (3, 8):
            actual = _paged(page, list(range(batch)), data, positions, dtype, batch)
            assert torch.equal(actual, expected[:batch]), (page, batch)
    order = torch.randperm(ROWS).tolist()
    assert torch.equal(_paged(16, order, data, positions, dtype, 1), expected[order])


MODEL = {"layers": 2, "heads": 3, "groups": 3, "dim": 20, "hidden": 101, "vocabulary": 333}
STEPS, CLASS_COUNT, NULL = 17, 2, 2
if interpreting():  # slowly; tests/kernels/test_gpu_step.py begins at the ends of pages
    MODEL, STEPS = {"layers": 2, "heads": 1, "groups": 1, "dim": 20, "hidden": 23, "vocabulary": 71}, 4


def _decode(
    images: list[int], page: int, late: dict[int, int], steps: int = STEPS
) -> tuple[dict[int, list[int]], dict[int, list[Tensor]]]:
    """Draws ``steps`` codes of each image in one batch; an image starts at its own step (continuous batching)."""
    weights = make_weights(MODEL, torch.float32, torch.Generator().manual_seed(5))
    columns = -(-steps // page)
    shape = (MODEL["layers"], 2 * len(images) * columns, page, MODEL["groups"], MODEL["dim"])
    k_cache, v_cache = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    pages = torch.randperm(shape[1], generator=torch.Generator().manual_seed(len(images)))
    table = dict(zip(images, pages.view(len(images), 2, columns).int(), strict=True))
    codes: dict[int, list[int]] = {image: [] for image in images}
    logits: dict[int, list[Tensor]] = {image: [] for image in images}
    for step in range(steps + max(late.values(), default=0)):
        live = [i for i in images if late.get(i, 0) <= step and len(codes[i]) < steps]
        if not live:
            continue
        tokens = [codes[i][-1] if codes[i] else i % CLASS_COUNT for i in live]
        tokens += [codes[i][-1] if codes[i] else NULL for i in live]
        count = len(live)
        inputs = ops.StepInputs(
            tokens_B=torch.tensor(tokens),
            positions_B=torch.tensor([len(codes[i]) for i in live], dtype=torch.int32).repeat(2),
            block_table_BM=torch.cat([torch.stack([table[i][row] for i in live]) for row in (0, 1)]),
            cond_row_I=torch.arange(count, dtype=torch.int32),
            null_row_I=torch.arange(count, 2 * count, dtype=torch.int32),
            cfg_scale_I=torch.full((count,), 1.5),
            temperature_I=torch.tensor([1.0 + 0.1 * (i % 3) for i in live]),
            top_k_I=torch.tensor([50 * (i % 2) for i in live], dtype=torch.int32),
            top_p_I=torch.tensor([1.0 - 0.1 * (i % 4) for i in live]),
            seed_I=torch.full((count,), 42),
            index_I=torch.tensor(live),
        )
        drawn, step_logits = ops.decode_step(weights, k_cache, v_cache, inputs)
        for at, image in enumerate(live):
            codes[image].append(int(drawn[at]))
            logits[image].append(step_logits[[at, at + count]])
    return codes, logits


@pytest.mark.both_runs
def test_decoding_depends_on_the_image_alone() -> None:
    """Codes and logits, bit by bit: batches of 1, 3 and 8 images, page sizes 1 to 1024, any order, late starts."""
    images = list(range(8))
    assert (preferred("decode_step", "cpu") == "triton") == interpreting()
    expected_codes: dict[int, list[int]] = {}
    expected_logits: dict[int, list[Tensor]] = {}
    for image in images:
        codes, logits = _decode([image], 16, {})
        expected_codes.update(codes)
        expected_logits.update(logits)
    for batch, page, late in (
        (images[:3], 1, {}),
        (images, 16, {1: 3, 4: 7}),
        (images[::-1], 64, {}),
        ([5, 2, 7], 256, {2: 1}),
        ([6, 0, 4], 1024, {}),
    ):
        codes, logits = _decode(batch, page, late)
        for image in batch:
            assert codes[image] == expected_codes[image]
            assert torch.equal(torch.stack(logits[image]), torch.stack(expected_logits[image]))


def test_decoding_does_not_depend_on_the_threads(threads: int) -> None:
    codes, logits = _decode([0, 1], 16, {}, steps=3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected_codes, expected_logits = _decode([0, 1], 16, {}, steps=3)
    finally:
        torch.set_num_threads(before)
    for image in (0, 1):
        assert codes[image] == expected_codes[image]
        assert torch.equal(torch.stack(logits[image]), torch.stack(expected_logits[image]))


def test_paged_decoding_is_dense_attention() -> None:
    """Step by step over pages, against whole-sequence attention, the zero class position and grouped heads included."""
    generator = torch.Generator().manual_seed(3)
    batch, heads, groups, positions, dim, page = 2, 4, 2, 26, 12, 4
    q = torch.randn(batch, heads, positions, dim, generator=generator)
    k, v = torch.randn(2, batch, groups, positions, dim, generator=generator)
    rope = ops.rope_table(5, 5, dim)
    dense = ops.rope_attention(q, k, v, rope)
    k_cache, v_cache = torch.full((2, 16, page, groups, dim), float("nan")).unbind()
    table = torch.randperm(16, generator=generator)[:14].view(2, 7).int()
    for at in range(positions):
        where = torch.full((batch,), at, dtype=torch.int32)
        out = ops.paged_attention(q[:, :, at], k[:, :, at], v[:, :, at], k_cache, v_cache, table, where, rope)
        torch.testing.assert_close(out, dense[:, :, at], atol=2e-6, rtol=1e-5)


def test_the_class_position_counts_by_value_alone() -> None:
    """Its rotated key is zero, so its score is zero for every query; an identity rotation would differ."""
    rope = ops.rope_table(2, 2, 8)
    q, k, v = torch.randn(3, 1, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    changed = k.clone()
    changed[:, :, 0] += 100
    assert torch.equal(ops.rope_attention(q, k, v, rope), ops.rope_attention(q, changed, v, rope))
    assert torch.equal(rope[0], torch.zeros(4, 2))
    assert torch.equal(rope[1], torch.tensor([[1.0, 0.0]] * 4))
