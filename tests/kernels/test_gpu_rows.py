"""Triton kernels of rms_norm, add_rms_norm and swiglu where test_ops.py does not go: memory, tiles, order of sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import triton_missing

if triton_missing():
    pytest.skip(str(triton_missing()), allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.kernels.launch import ARCHITECTURES, FLOATS, TYPES, Kernel, Variant
from retinar.kernels.rms_norm import gpu as norm_gpu
from retinar.kernels.rms_norm import long_rows, reference, tiles, weight_gradient
from retinar.kernels.rows import as_rows, vector, whole_vectors
from retinar.kernels.swiglu import gpu as swiglu_gpu

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"
)

EPS = 1e-5
# The interpreter cuts bf16 off instead of rounding it: its tolerance shows a wrong index, not a wrong rounding.
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    scale = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(actual, expected, rtol=CLOSE[actual.dtype], atol=CLOSE[actual.dtype] * scale)


def run(name: str, tensors: list[Tensor], backend: str | None, used: tuple[int, ...] = (0, 1)) -> list[Tensor | None]:
    """Results of an op, then the gradients of its inputs when the results ``used`` flow into a loss."""
    leaves = [each.detach().requires_grad_() for each in tensors]
    extra = {} if name == "swiglu" else {"eps": EPS}
    results = getattr(ops, name)(*leaves, **extra, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    chosen = [each for place, each in enumerate(results) if place in used]
    cotangents = [normal(*each.shape, dtype=each.dtype, seed=place) for place, each in enumerate(chosen)]
    return [*results, *torch.autograd.grad(chosen, leaves, cotangents, allow_unused=True)]


def agree(name: str, tensors: list[Tensor], used: tuple[int, ...] = (0, 1)) -> None:
    """Triton against the reference, whose inputs are the same numbers side by side in memory."""
    plain = [each.detach().clone(memory_format=torch.contiguous_format) for each in tensors]
    pairs = zip(run(name, tensors, "triton", used), run(name, plain, "reference", used), strict=True)
    for actual, expected in pairs:
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            close(actual, expected)


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype, place: Any = lambda t: t) -> list[Tensor]:
    """Arguments of an op for rows [..., width], each put into memory by ``place`` (the weight is not)."""
    count = {"rms_norm": 1, "add_rms_norm": 2, "swiglu": 2, "packed": 1}[name]
    if name == "packed":
        shape = (*shape[:-1], 2 * shape[-1])
    rows = [place(normal(*shape, dtype=dtype, seed=seed)) for seed in range(count)]
    return [*rows, 1 + normal(shape[-1], dtype=dtype, seed=9) / 4] if "norm" in name else rows


OPS = ("rms_norm", "add_rms_norm", "swiglu", "packed")


def op_of(name: str) -> str:
    return "swiglu" if name == "packed" else name


# ---------------------------------------------------------------------------------------------------------------------
# Where tensors lie in memory


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, one element behind a multiple of 16 bytes."""
    base = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    return base[1:].view(x.shape).copy_(x)


def padded(x: Tensor) -> Tensor:
    """The same numbers in rows with a gap of one element behind each."""
    return torch.full((*x.shape[:-1], x.shape[-1] + 1), float("nan"), dtype=x.dtype)[..., :-1].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The same numbers with the leading dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def far_apart(x: Tensor) -> Tensor:
    """The same numbers in two rows more than 2^31 elements apart; the pages between them are never touched."""
    stride = 2**31 + 8
    out = torch.empty(stride + x.shape[-1], dtype=x.dtype).as_strided(x.shape, (stride, 1))
    return out.copy_(x)


@pytest.mark.parametrize("place", [misaligned, padded, transposed], ids=lambda place: place.__name__)
@pytest.mark.parametrize("width", [24, 13])
@pytest.mark.parametrize("name", OPS)
def test_memory_layouts(name: str, width: int, place: Any) -> None:
    tensors = inputs(name, (2, 3, width), torch.float32, place)
    assert tensors[0].data_ptr() % 16 or not tensors[0].is_contiguous()
    agree(op_of(name), tensors)


@pytest.mark.parametrize("width", [64, 67])
@pytest.mark.parametrize("name", OPS)
def test_addresses_beyond_32_bits(name: str, width: int) -> None:
    tensors = inputs(name, (2, width), torch.float16, far_apart)
    assert tensors[0].stride(0) > 2**31
    agree(op_of(name), tensors)


@pytest.mark.parametrize("layout", ["far_apart", "expanded", "transposed", "misaligned"])
@pytest.mark.parametrize("name", OPS)
def test_gradients_that_are_not_contiguous(name: str, layout: str) -> None:
    tensors = inputs(name, (2, 64), torch.float16)
    leaves = [each.requires_grad_() for each in tensors]
    extra = {} if op_of(name) == "swiglu" else {"eps": EPS}
    found = []
    for backend in ("triton", "reference"):
        results = getattr(ops, op_of(name))(*leaves, **extra, backend=backend)
        results = results if isinstance(results, tuple) else (results,)
        grads = []
        for seed, result in enumerate(results):
            grad = normal(*result.shape, dtype=result.dtype, seed=seed)
            if layout == "far_apart":
                grad = far_apart(grad)
            elif layout == "expanded":
                grad = grad[:1].expand_as(result)
            elif layout == "transposed":
                grad = grad.t().contiguous().t()
            else:
                grad = misaligned(grad)
            grads.append(grad if backend == "triton" else grad.clone(memory_format=torch.contiguous_format))
        found.append(torch.autograd.grad(results, leaves, grads))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_rows_are_views_where_strides_allow_it() -> None:
    x = torch.zeros(4, 6, 8)
    assert as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(x[:, :, ::2]).stride() == (4, 1)  # gaps inside rows: copied
    assert as_rows(x[:, 0]).stride() == (48, 1)
    assert as_rows(x[0, 0]).shape == (1, 8)
    assert as_rows(x[:1, :1]).stride(0) == 0  # one row: its stride is nobody's obstacle
    assert as_rows(x[0, 0, :1].expand(5).reshape(5, 1)).shape == (5, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, dtypes, results that nobody uses


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 8)])
@pytest.mark.parametrize("name", OPS)
def test_nothing_to_do(name: str, shape: tuple[int, ...]) -> None:
    agree(op_of(name), inputs(name, shape, torch.float32))


@pytest.mark.parametrize("name", OPS)
def test_one_dimension(name: str) -> None:
    agree(op_of(name), inputs(name, (24,), torch.float32))


@pytest.mark.parametrize("used", [(0,), (1,)], ids=["normed", "sum"])
@pytest.mark.parametrize("width", [64, 67])
def test_one_result_of_add_rms_norm(width: int, used: tuple[int, ...]) -> None:
    tensors = inputs("add_rms_norm", (3, width), torch.float32)
    agree("add_rms_norm", tensors, used)
    if used == (1,):  # the sum alone: its gradient passes through, and the weight has none
        *_, grad_x, grad_residual, grad_weight = run("add_rms_norm", tensors, "triton", used)
        assert grad_weight is None
        assert grad_x is not None
        assert torch.equal(grad_x, normal(3, width))
        assert torch.equal(grad_x, grad_residual)


def test_add_rms_norm_rounds_its_gradient_once() -> None:
    """The gradient of the sum is added in fp32: two roundings would lose what is below half an ulp of each."""
    x, residual, weight = inputs("add_rms_norm", (64, 64), torch.float16)
    leaves = [each.requires_grad_() for each in (x, residual, weight)]
    for backend in ("triton", "reference"):
        normed, total = ops.add_rms_norm(*leaves, EPS, backend=backend)
        grads = [normal(64, 64, dtype=torch.float16, seed=seed) for seed in (1, 2)]
        actual, _, _ = torch.autograd.grad((normed, total), leaves, grads)
        wide = [each.detach().double().requires_grad_() for each in (total, weight)]
        norm = ops.rms_norm(*wide, EPS, backend="reference")
        exact = torch.autograd.grad(norm, wide[0], grads[0].double())[0] + grads[1].double()
        wrong = (actual != exact.half()).float().mean().item()
        assert wrong < 0.01, backend  # fp32 inside: next to ties only


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weight_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = normal(5, 64, dtype=dtype).requires_grad_(), (1 + normal(64) / 4).to(weight_dtype).requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        out = ops.rms_norm(x, weight, EPS, backend=backend)
        found.append((out, *torch.autograd.grad(out, (x, weight), normal(5, 64, dtype=dtype, seed=1))))
    assert found[0][2].dtype == weight_dtype
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [24, 13])
def test_epsilon_zero(width: int, dtype: torch.dtype) -> None:
    """Rows that a tile has but the tensor has not would have an infinite scale, and NaN in the weight's gradient."""
    grad, x, weight = normal(3, width, dtype=dtype, seed=1), normal(3, width, dtype=dtype), torch.ones(width).to(dtype)
    pairs = zip(
        norm_gpu.rms_norm_backward(grad, x, weight, 0.0), reference.rms_norm_backward(grad, x, weight, 0.0), strict=True
    )
    for actual, expected in pairs:
        close(actual, expected)


def test_not_a_number_stays_in_its_row() -> None:
    x = normal(6, 64)
    x[2, 5] = float("nan")
    out = ops.rms_norm(x, torch.ones(64), EPS, backend="triton")
    assert out[2].isnan().all()
    assert not out[[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gate_far_from_zero() -> None:
    """exp overflows on one side; silu and its derivative have limits there."""
    gate = torch.tensor([-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4])
    agree("swiglu", [gate, torch.full_like(gate, 2.0)])


# ---------------------------------------------------------------------------------------------------------------------
# Every tile, and the order of sums


def _edges(which: tiles.Tiles) -> Iterator[Any]:
    """The widest row of each tile, and the narrowest."""
    for dtype, each in which.by_dtype.items():
        narrowest = vector(dtype)
        for tile in each:
            for width in (narrowest, tile.width(dtype)):
                yield pytest.param(tile, dtype, width, id=f"{TYPES[dtype]}-{width}")
            narrowest = tile.width(dtype) + vector(dtype)


@pytest.mark.parametrize(("tile", "dtype", "width"), list(_edges(tiles.FORWARD_TILES)))
def test_forward_tiles(tile: tiles.Tile, dtype: torch.dtype, width: int) -> None:
    assert tiles.FORWARD_TILES.choose(width, dtype) is tile
    x, residual = (normal(5, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = (1 + normal(width) / 4).to(dtype)
    close(norm_gpu.rms_norm(x, weight, EPS), ops.rms_norm(x, weight, EPS, backend="reference"))
    pairs = (
        norm_gpu.add_rms_norm(x, residual, weight, EPS),
        ops.add_rms_norm(x, residual, weight, EPS, backend="reference"),
    )
    for actual, expected in zip(*pairs, strict=True):
        close(actual, expected)


@pytest.mark.parametrize(("tile", "dtype", "width"), list(_edges(tiles.BACKWARD_TILES)))
def test_backward_tiles(tile: tiles.Tile, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, so that each goes through several groups of rows, the last one not whole."""
    monkeypatch.setattr(norm_gpu, "MULTIPROCESSORS", dict.fromkeys(ARCHITECTURES, 1))
    assert tiles.BACKWARD_TILES.choose(width, dtype) is tile
    grad, more, x = (normal(17, width, dtype=dtype, seed=seed) for seed in range(3))
    weight = (1 + normal(width) / 4).to(dtype)
    pairs = [
        (norm_gpu.rms_norm_backward(grad, x, weight, EPS), reference.rms_norm_backward(grad, x, weight, EPS)),
        (
            norm_gpu.add_rms_norm_backward(grad, more, x, weight, EPS),
            reference.add_rms_norm_backward(grad, more, x, weight, EPS),
        ),
    ]
    for actual, expected in pairs:
        close(actual[0], expected[0])
        close(actual[1], expected[1])


@pytest.mark.parametrize("width", [13, 2051])
def test_long_rows_walk(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "MULTIPROCESSORS", dict.fromkeys(ARCHITECTURES, 1))
    agree("rms_norm", inputs("rms_norm", (11, width), torch.float32))
    agree("add_rms_norm", inputs("add_rms_norm", (11, width), torch.float32))


@pytest.mark.parametrize("width", [64, 67])
def test_the_gradient_of_the_weight_is_deterministic(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in every run, whatever the strides."""
    monkeypatch.setattr(norm_gpu, "MULTIPROCESSORS", dict.fromkeys(ARCHITECTURES, 2))
    monkeypatch.setattr(long_rows, "MULTIPROCESSORS", dict.fromkeys(ARCHITECTURES, 2))
    tensors = inputs("rms_norm", (37, width), torch.float32)
    (first, second, third) = (
        run("rms_norm", each, "triton")[-1] for each in (tensors, tensors, [padded(tensors[0]), tensors[1]])
    )
    assert first is not None
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("width", [64, 67])
def test_the_bits_of_a_row_depend_on_it_alone(width: int) -> None:
    x, weight = normal(9, width), 1 + normal(width) / 4
    whole = ops.rms_norm(x, weight, EPS, backend="triton")
    for row in range(9):
        assert torch.equal(ops.rms_norm(x[row], weight, EPS, backend="triton"), whole[row])
    assert torch.equal(ops.rms_norm(padded(x), weight, EPS, backend="triton"), whole)


# ---------------------------------------------------------------------------------------------------------------------
# What is launched was compiled

dtypes = st.sampled_from(FLOATS)


@given(width=st.integers(1, 20_000), dtype=dtypes, add=st.booleans(), architecture=st.sampled_from(ARCHITECTURES))
def test_norm_launchers_stay_in_their_tables(width: int, dtype: torch.dtype, add: bool, architecture: int) -> None:
    for kernel, which in ((norm_gpu.FORWARD, tiles.FORWARD_TILES), (norm_gpu.BACKWARD, tiles.BACKWARD_TILES)):
        tile = which.choose(width, dtype)
        if tile is None:
            assert width % vector(dtype) or all(each.width(dtype) < width for each in which.by_dtype[dtype])
        else:
            variant = which.variant(dtype, tile, add, architecture)
            assert variant in kernel.variants[architecture]
            constants = dict(variant.constants)
            assert width <= constants["SPAN"] * constants["CHUNKS"] <= constants["SPAN"] * constants["PADDED"]
            programs = tile.resident[add] * weight_gradient.MULTIPROCESSORS[architecture]
            assert programs <= weight_gradient.MOST


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    gap=st.integers(0, 9),
    offset=st.integers(0, 9),
    dtype=dtypes,
    architecture=st.sampled_from(ARCHITECTURES),
)
def test_swiglu_launchers_stay_in_their_tables(
    rows: int, width: int, gap: int, offset: int, dtype: torch.dtype, architecture: int
) -> None:
    x = torch.zeros(rows * (width + gap) + offset, dtype=dtype)[offset:].view(rows, width + gap)[:, :width]
    flat = as_rows(x)
    assert flat.data_ptr() % 16 == 0
    assert torch.equal(flat, x)
    vectors = whole_vectors(width, flat.stride(0), dtype=dtype)
    for kernel, pointers in ((swiglu_gpu.FORWARD, 3), (swiglu_gpu.BACKWARD, 5)):
        variant = swiglu_gpu.choose(pointers, dtype, vectors, architecture)
        assert variant in kernel.variants[architecture]
        assert flat.stride(0) % dict(variant.constants)["VEC"] == 0
        assert width % dict(variant.constants)["VEC"] == 0


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(OPS),
    rows=st.integers(0, 6),
    width=st.integers(0, 70),
    gap=st.integers(0, 9),
    offset=st.integers(0, 9),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)
def test_any_rows(name: str, rows: int, width: int, gap: int, offset: int, dtype: torch.dtype) -> None:
    def place(x: Tensor) -> Tensor:
        pitch = x.shape[1] + gap
        return (
            torch.full((offset + rows * pitch,), float("nan"), dtype=dtype)[offset:]
            .view(rows, pitch)[:, : x.shape[1]]
            .copy_(x)
        )

    launched: list[tuple[Kernel, Variant]] = []
    original = Kernel.launch

    def launch(self: Kernel, grid: Any, arguments: Any, constants: Any, num_warps: int, num_stages: int = 1) -> None:
        pointers = tuple(TYPES[each.dtype] for each in arguments if isinstance(each, Tensor))
        launched.append((self, Variant(90, pointers, tuple(constants.items()), num_warps, num_stages)))
        original(self, grid, arguments, constants, num_warps, num_stages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", launch)
        agree(op_of(name), inputs(name, (rows, width), dtype, place))
    assert bool(launched) == (rows * width > 0)
    assert all(variant in kernel.variants[90] for kernel, variant in launched)
