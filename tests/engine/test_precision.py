"""Precisions by name: what they are, where they run, and that int8 keeps what every precision promises."""

from __future__ import annotations

import pytest
import torch

from retinar.engine import precision
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.precision import PRECISIONS, find_precision
from retinar.engine.request import Request, SamplingParams, make_request
from retinar.engine.sampler import Sampler
from retinar.kernels import ops

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PARAMS = (SamplingParams(), SamplingParams(cfg_scale=1.0, top_k=9), SamplingParams(cfg_scale=4.0, cfg_interval=4))


@pytest.fixture
def compiled() -> None:
    if not ops.native_info()["loaded"]:
        pytest.skip(str(ops.native_info()["reason"]))


def requests(count: int) -> list[Request]:
    return [make_request(index, index % 2, PARAMS[index % 3], seed=3) for index in range(count)]


def test_names_and_dtypes() -> None:
    assert find_precision(None, CPU, None).name == find_precision(torch.float32, CPU, None).name == "float32"
    assert find_precision(None, GPU, None).name == find_precision("bfloat16", GPU, None).name == "bfloat16"
    for bad in ("float16", torch.float16, "fp32", 3):
        with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, int8, int8-cache, got"):
            find_precision(bad, CPU, None)  # type: ignore[arg-type]


def test_int8_is_the_compiled_decoders(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_precision("int8", CPU, None) is PRECISIONS["int8"]
    for device, backend in ((GPU, None), (CPU, "reference")):
        with pytest.raises(InputError, match="int8 runs on a CPU with the compiled module"):
            find_precision("int8", device, backend)
    monkeypatch.setattr(precision.ops, "native_info", lambda: {"loaded": False, "isa": None, "reason": "no compiler"})
    with pytest.raises(InputError, match="int8-cache needs the compiled module: no compiler"):
        find_precision("int8-cache", CPU, None)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_an_image_depends_on_itself_alone(tiny_gpt: GPT, compiled: None, dtype: str) -> None:
    sampler = Sampler(tiny_gpt, device="cpu", dtype=dtype)
    assert sampler.origin.dtype == dtype and sampler.origin.implementation["backend"] == "native"
    alone = dict(sampler.sample_codes(requests(6), max_images=1))
    for limits in ({"max_images": 6}, {"max_images": 4, "page_size": 1}, {"max_images": 5, "page_size": 1024}):
        together = dict(sampler.sample_codes(requests(6)[::-1], **limits))
        assert all(torch.equal(together[index], codes_T) for index, codes_T in alone.items()), limits


def test_precisions_draw_alike_but_not_the_same(tiny_gpt: GPT, compiled: None) -> None:
    """Equal noise, logits that differ by rounding: most first codes agree, whole images do not."""
    drawn = {}
    for dtype in PRECISIONS:
        made = dict(Sampler(tiny_gpt, device="cpu", dtype=dtype).sample_codes(requests(24)))
        drawn[dtype] = torch.stack([made[index] for index in range(24)])
    assert not torch.equal(drawn["int8"], drawn["bfloat16"]) and not torch.equal(drawn["int8"], drawn["int8-cache"])
    for dtype in ("bfloat16", "int8", "int8-cache"):
        assert (drawn[dtype][:, 0] == drawn["float32"][:, 0]).float().mean() > 0.8, dtype
