"""linear's Triton kernel where the walk over all ops does not go: bits, gaps, addresses, tables, launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import ARCHITECTURES, FLOATS, Kernel

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"
)

FORMS = ("", "norm", "gate", "residual", "wide", "norm gate", "norm residual", "norm wide")
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.replace(" ", "-") or "plain")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


class Call(NamedTuple):
    """Arguments of one call; norm and residual may be absent."""

    x: Tensor
    weight: Tensor
    norm: Tensor | None
    residual: Tensor | None
    form: str
    eps: float = 1e-5

    def run(self, backend: str = "triton") -> Tensor:
        behind = {"gate": "gate" in self.form, "wide": "wide" in self.form}
        others: dict[str, Any] = {"norm_K": self.norm, "residual_XN": self.residual, "eps": self.eps, **behind}
        return ops.linear(self.x, self.weight, **others, backend=backend)

    def but(self, **changed: Any) -> Call:
        return self._replace(**changed)

    def tensors(self) -> dict[str, Tensor]:
        return {key: each for key, each in self._asdict().items() if isinstance(each, Tensor)}

    def of(self, rows: Any) -> Call:
        """The same of some rows."""
        return self.but(x=self.x[rows], residual=None if self.residual is None else self.residual[rows])

    def truth(self) -> Tensor:
        return self.but(**{key: each.double() for key, each in self.tensors().items()}).run("reference")

    def check(self) -> Tensor:
        """Runs it, holds it to the truth, and returns what came out."""
        actual, expected = self.run(), self.truth()
        assert actual.dtype == (torch.float32 if "wide" in self.form else self.x.dtype)
        accuracy = 1e-4 if self.x.dtype == torch.float32 else 6e-3
        torch.testing.assert_close(actual.double(), expected, atol=accuracy, rtol=accuracy)
        return actual


def _call(rows: int, inner: int, outer: int, dtype: torch.dtype, form: str = "") -> Call:
    generator = torch.Generator().manual_seed(inner)
    weight = torch.randn(outer, inner, generator=generator) * max(inner, 1) ** -0.5
    x = torch.randn(rows, inner, generator=generator)
    norm = 1 + 0.2 * torch.randn(inner, generator=generator)
    residual = torch.randn(rows, outer, generator=generator)
    return Call(
        x.to(dtype),
        weight.to(dtype),
        norm.to(dtype) if "norm" in form else None,
        residual.to(dtype) if "residual" in form else None,
        form,
    )


def _spread(x: Tensor, gap: int, left: int) -> Tensor:
    """The matrix in the middle of NaN: rows before, behind, and between."""
    wide = torch.full((len(x) + 2, x.shape[1] + gap), float("nan"), dtype=x.dtype)
    return wide[1:-1, left : left + x.shape[1]].copy_(x)


def _inside(x: Tensor, offset: int) -> Tensor:
    """The tensor in one piece in the middle of NaN, at any offset."""
    memory = torch.full((x.numel() + 64,), float("nan"), dtype=x.dtype)
    return memory[offset : offset + x.numel()].view(x.shape).copy_(x)


@forms
@pytest.mark.parametrize(
    ("inner", "outer", "dtype"), [(33, 38, torch.float32), (256, 20, torch.float32), (200, 18, torch.float16)], ids=str
)
def test_a_row_depends_on_itself_alone(inner: int, outer: int, dtype: torch.dtype, form: str) -> None:
    """Bit by bit: any number of rows, any order, and neighbours that hold NaN."""
    call = _call(130, inner, outer, dtype, form)
    expected = call.check()
    for row in (0, 15, 64, 129):
        assert torch.equal(call.of(slice(row, row + 1)).run(), expected[row : row + 1]), row
    for rows in (2, 17, 64, 65):
        assert torch.equal(call.of(slice(rows)).run(), expected[:rows]), rows
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    assert torch.equal(call.of(order).run(), expected[order])
    call.x[1::2] = float("nan")
    poisoned = call.run()
    assert torch.equal(poisoned[::2], expected[::2])
    assert poisoned[1::2].isnan().all()


@pytest.mark.parametrize("form", ["", "gate", "residual", "wide"])
@pytest.mark.parametrize("outer", [3460, 6918])
def test_wide_weights(outer: int, form: str) -> None:
    """The other tiles: programs of 32 and of 64 rows of the weight."""
    call = _call(3, 72, outer, torch.float16, form)
    actual = call.check()
    assert torch.equal(call.of(slice(1, 2)).run(), actual[1:2])


@pytest.mark.parametrize("form", ["norm", "norm gate", "norm wide"])
@pytest.mark.parametrize("columns", [16, 32, 64])
def test_tiles_of_bf16_with_a_norm(columns: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no products in bf16: its tiles with a norm, in fp16 here, whose range these rows keep to."""
    from retinar.kernels.linear import gpu

    call = _call(66, 136, 150, torch.float16, form)
    fused = gpu.Form(True, "gate" in form, wide="wide" in form)
    variant = gpu.variant_of(ARCHITECTURES[-1], torch.bfloat16, columns * gpu.FEWEST, fused)
    assert dict(variant.constants)["COLUMNS"] == columns

    def launch(self: Kernel, grid: Any, arguments: Any, constants: Any, *shape: int) -> None:
        assert constants == dict(variant.constants)
        self.function[grid](*arguments, **constants)

    monkeypatch.setattr(gpu, "takes_norm", lambda dtype, inner: True)
    monkeypatch.setattr(gpu, "variant_of", lambda *arguments: variant)
    monkeypatch.setattr(Kernel, "launch", launch)
    actual = call.check()
    for rows in (slice(1), slice(63, 66)):
        assert torch.equal(call.of(rows).run(), actual[rows])


@forms
@dtypes
@pytest.mark.parametrize("inner", [1, 24, 136])
def test_nothing_is_read_beside_the_rows(inner: int, dtype: torch.dtype, form: str) -> None:
    """Rows with NaN between them, weights in the middle of NaN, at any offset; against dense copies, bit by bit."""
    call = _call(5, inner, 18, dtype, form)
    expected = call.check()
    x, weight, norm, residual = call[:4]
    for gap, left, offset in ((8, 0, 16), (3, 1, 1)):
        spread = call.but(
            x=_spread(x, gap, left),
            weight=_inside(weight, offset),
            norm=None if norm is None else _inside(norm, offset),
            residual=None if residual is None else _spread(residual, gap, left),
        )
        assert torch.equal(spread.run(), expected), gap
    for key, each in call.tensors().items():
        turned = each.t().contiguous().t() if each.dim() == 2 else each.repeat_interleave(2)[::2]
        assert torch.equal(call.but(**{key: turned}).run(), expected), key
    twice = call.but(x=x.expand(2, 5, inner), residual=None if residual is None else residual.expand(2, 5, 18))
    assert torch.equal(twice.run(), expected.expand(2, *expected.shape))


def test_one_residual_for_all_rows() -> None:
    call = _call(5, 24, 18, torch.float32, "residual")
    assert call.residual is not None
    for residual in (call.residual[:1].expand(5, 18), call.residual[:, :1].expand(5, 18)):
        dense = call.but(residual=residual.contiguous())
        assert torch.equal(call.but(residual=residual).run(), dense.run())
    one = call.but(x=call.x[0], residual=call.residual[0])
    assert torch.equal(one.run(), call.run()[0])


@dtypes
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("magnitude", [1e4, 1.0, 1e-4])
def test_norms_of_large_and_small_rows(magnitude: float, eps: float, dtype: torch.dtype) -> None:
    """The products of fp16 stay in range whatever the size of x and of the norm's weight."""
    call = _call(5, 40, 18, dtype, "norm")
    assert call.norm is not None
    for size in (1.0, 100.0, 0.01):
        sized = call.but(x=call.x * magnitude, norm=call.norm * size, weight=call.weight / size, eps=eps)
        assert sized.check().isfinite().all()
    mixed = call.but(x=call.x * torch.tensor([1e4, 1, 1e-4, 0, 1e3])[:, None].to(dtype))
    mixed.check()


@dtypes
def test_gates_far_from_zero(dtype: torch.dtype) -> None:
    call = _call(5, 40, 18, dtype, "gate")
    call.weight[:9] *= 100  # silu of minus hundreds is -0, of hundreds the number itself
    assert call.check().isfinite().all()


def test_many_rows() -> None:
    for form in ("norm gate", "residual"):
        call = _call(2100, 40, 18, torch.float16, form)
        assert torch.equal(call.of(slice(2000, 2100)).run(), call.check()[2000:])


def test_addresses_past_2_to_the_31() -> None:
    """Rows that lie 2^30 elements apart: the fourth is past what 32 bits reach. Untouched memory costs nothing."""
    call = _call(4, 48, 20, torch.float16, "residual")
    assert call.residual is not None
    far = {"x": call.x, "residual": call.residual}
    for key, each in far.items():
        apart = torch.empty(3 * 2**30 + each.shape[1], dtype=each.dtype).as_strided(each.shape, (2**30, 1))
        assert torch.equal(call.but(**{key: apart.copy_(each)}).run(), call.run())


@forms
def test_nothing_in_nothing_out(form: str) -> None:
    outer = 3 if "gate" in form else 6
    assert _call(0, 8, 6, torch.float32, form).run().shape == (0, outer)
    assert _call(3, 8, 0, torch.float32, form).run().shape == (3, 0)
    no_k = _call(3, 0, 6, torch.float32, form)
    assert torch.equal(no_k.run(), torch.zeros(3, outer) if no_k.residual is None else no_k.residual)


def test_fp64_is_refused_in_words() -> None:
    x, weight = torch.ones(2, 8).double(), torch.ones(3, 8).double()
    with pytest.raises(ValueError, match=r"it takes float32, float16 under the interpreter, found torch\.float64"):
        ops.linear(x, weight, backend="triton")


@forms
@pytest.mark.parametrize("inner", [40, 41])
@dtypes
def test_launches(dtype: torch.dtype, inner: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, but for a norm that cannot go along: in fp16, with other K than whole vectors, with a residual behind."""
    launched: list[str] = []
    monkeypatch.setattr(Kernel, "launch", lambda self, *args: launched.append(self.op))
    _call(2, inner, 6, dtype, form).run()
    apart = "norm" in form and (dtype == torch.float16 or inner == 41 or "residual" in form)
    assert launched == ["rms_norm"] * apart + ["linear"]


@settings(max_examples=300, deadline=None)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    dtype=st.sampled_from(FLOATS),
    outer=st.integers(1, 60000),
    form=st.sampled_from(FORMS),
)
def test_every_choice_is_in_the_tables(arch: int, dtype: torch.dtype, outer: int, form: str) -> None:
    from retinar.kernels.linear import gpu

    chosen = gpu.Form("norm" in form, "gate" in form, "residual" in form, "wide" in form)
    apart = chosen.norm and (chosen.residual or not gpu.takes_norm(dtype, 64))
    assert (gpu.variant_of(arch, dtype, outer, chosen) in gpu.LINEAR.variants[arch]) == (not apart)
    columns = gpu.columns_of(outer)
    assert columns == gpu.COLUMNS[-1] or -(-outer // columns) >= gpu.FEWEST
