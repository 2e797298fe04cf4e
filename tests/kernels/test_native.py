"""The compiled CPU kernels, on every instruction set that this processor can run."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.native import native_module

EVERY_ISA = ["portable", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture(scope="module")
def native() -> ModuleType:
    module, reason = native_module()
    if module is None:
        pytest.skip(str(reason))
    return module


def _run(native: ModuleType, x: Tensor, weight: Tensor, isa: str) -> Tensor:
    out = torch.full_like(x, float("nan"))
    native.rms_norm(x, weight, out, 1e-5, isa)
    return out


WIDTHS = (1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 257, 384, 1280)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", EVERY_ISA)
def test_every_instruction_set(native: ModuleType, isa: str, dtype: torch.dtype) -> None:
    """Within the rounding of the result of the fp64 truth; bodies and tails of every length."""
    if isa not in native.isas():
        with pytest.raises(ValueError, match=isa):
            _run(native, torch.zeros(1, 1), torch.zeros(1), isa)
        return
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(width)
        x = torch.randn(3, width, generator=generator).to(dtype)
        weight = torch.randn(width, generator=generator).to(dtype)
        truth = ops.rms_norm(x.double(), weight.double(), backend="reference")
        steps = 4 if dtype == torch.float32 else 1  # the sum's own rounding shows in fp32; bf16 rounds twice by half
        torch.testing.assert_close(
            _run(native, x, weight, isa).double(), truth, rtol=steps * torch.finfo(dtype).eps, atol=1e-30
        )


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_rows_do_not_depend_on_the_batch(native: ModuleType, isa: str) -> None:
    if isa not in native.isas():
        pytest.skip(f"this processor does not run {isa}")
    for width in WIDTHS:
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(width))
        alone = torch.cat([_run(native, x[row : row + 1].clone(), torch.ones(width), isa) for row in range(8)])
        assert torch.equal(_run(native, x, torch.ones(width), isa), alone)


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_bfloat16_rounds_as_torch_does(native: ModuleType, isa: str) -> None:
    """Ties to even, subnormals, infinities and NaN through every conversion: x = 1 makes the norm a plain product."""
    if isa not in native.isas():
        pytest.skip(f"this processor does not run {isa}")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = bits.view(torch.bfloat16)
    x = torch.ones(1, len(weight), dtype=torch.bfloat16)
    x[0, ::3] = 1.0078125  # so that products need rounding
    actual = _run(native, x, weight, isa)
    scale = (x.double().square().mean() + 1e-5).rsqrt().float()
    expected = (x.float() * scale).bfloat16() * weight
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def test_wrong_arrays_are_refused(native: ModuleType) -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    for bad in (
        (x, torch.zeros(7), torch.zeros(2, 8)),
        (x, weight, torch.zeros(3, 8)),
        (x, weight.bfloat16(), torch.zeros(2, 8)),
        (x.double(), weight.double(), torch.zeros(2, 8, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="rms_norm: expected"):
            native.rms_norm(*bad, 1e-5)
    with pytest.raises(TypeError):
        native.rms_norm(x.t(), weight, torch.zeros(8, 2), 1e-5)


def test_native_is_what_a_cpu_runs(native: ModuleType) -> None:
    info = ops.native_info()
    assert info["loaded"] and info["isa"] in native.isas() and info["reason"] is None
    x, weight = torch.randn(4, 100), torch.ones(100)
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x, weight, backend="native"))
    assert ops.backends("rms_norm")["native"] is None
