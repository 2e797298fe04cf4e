"""Guided sampling's Triton backend under the interpreter: words, noise, filters and codes are the reference's."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
import triton.language as tl
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinar.kernels.cfg_sample import gpu, reference
from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import ARCHITECTURES, Kernel
from retinar.kernels.philox.noise import gumbel, noise, words
from retinar.kernels.philox.reference import gumbel_noise, philox4x32, uniform

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the interpreter: infinities are meant
]
ONES = 2**32 - 1
INF, NAN = float("inf"), float("nan")


@triton.jit
def _store_words(quads, position, index, seed, out, DOMAIN: tl.constexpr, QUADS: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, QUADS)
    w0, w1, w2, w3 = words(tl.load(quads + place), tl.load(position), tl.load(index), tl.load(seed), DOMAIN)
    tl.store(out + place, w0.to(tl.int64))
    tl.store(out + QUADS + place, w1.to(tl.int64))
    tl.store(out + 2 * QUADS + place, w2.to(tl.int64))
    tl.store(out + 3 * QUADS + place, w3.to(tl.int64))


@triton.jit
def _store_gumbel(start, position, index, seed, out, DOMAIN: tl.constexpr, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    drawn = gumbel(start, tl.load(position), tl.load(index), tl.load(seed), DOMAIN, CODES)
    tl.store(out + tl.arange(0, CODES), drawn)


@triton.jit
def _store_noise(word, out, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, CODES)
    tl.store(out + place, noise(tl.load(word + place).to(tl.uint32)))


def _words(quads: Tensor, position: int, index: int, domain: int, seed: int) -> Tensor:
    """[4, quads] by the kernel's function."""
    out = torch.empty(4, len(quads), dtype=torch.int64)
    scalars = [torch.tensor([each]) for each in (position, index, seed)]
    _store_words[(1,)](quads, *scalars, out, DOMAIN=domain, QUADS=len(quads))
    return out


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >> 63 else seed


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: tuple[int, int, int, int], key: int, answer: tuple[int, ...]) -> None:
    quad, position, index, domain = counter
    assert _words(torch.tensor([quad]), position, index, domain, _signed(key))[:, 0].tolist() == list(answer)


def _units(one: Tensor, other: Tensor) -> float:
    """The largest difference in ulp, as in test_philox.py: an ulp of the inner logarithm is at least 2^-24."""
    ulp = torch.nextafter(other.abs(), torch.tensor(INF)) - other.abs()
    return ((one.double() - other.double()).abs() / ulp.clamp(min=2.0**-24)).max().item()


@given(
    quad=st.integers(0, 2**30 - 64),
    position=st.integers(0, 2**31 - 1),
    index=st.integers(-(2**63), 2**63 - 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    domain=st.sampled_from([0, 1]),
)
@settings(max_examples=25, deadline=None)
def test_words_and_noise_are_the_references(quad: int, position: int, index: int, seed: int, domain: int) -> None:
    quads = quad + torch.arange(16)
    counter = (quads, torch.tensor(position), torch.tensor(index), torch.tensor(domain))
    expected = torch.stack(torch.broadcast_tensors(*philox4x32(counter, torch.tensor(seed))))
    assert torch.equal(_words(quads, position, index, domain, seed), expected)
    scalars = [torch.tensor([each]) for each in (position, index, seed)]
    drawn = torch.empty(64)
    _store_gumbel[(1,)](0, *scalars, drawn, DOMAIN=domain, CODES=64)
    theirs = gumbel_noise(scalars[2], scalars[1], scalars[0], 64, domain)[0]
    assert _units(drawn, theirs) <= 2


def test_noise_over_the_whole_range() -> None:
    """Every word below 2^14, 2^13 of every binade above, and the last ones."""
    generator = torch.Generator().manual_seed(1)
    binades = [torch.randint(2**bit, 2 ** (bit + 1), (2**13,), generator=generator) for bit in range(14, 32)]
    word = torch.cat([torch.arange(2**14), *binades, torch.arange(2**32 - 2**12, 2**32)])
    word = torch.cat([word, word[: 2**18 - len(word)]])
    out = torch.empty(2**18)
    _store_noise[(1,)](word, out, CODES=2**18)
    assert torch.isfinite(out).all()
    x = uniform(word)
    assert _units(out, -torch.log(-torch.log1p(-x))) <= 2
    assert _units(out, -torch.log(-torch.log1p(-x.double())).float()) <= 2


def _parameters(images: int, generator: torch.Generator, **given: Any) -> dict[str, Tensor]:
    """Random ones, those given in their place; two images of three are guided."""
    made = {
        "cond_row": torch.arange(images),
        "null_row": torch.where(torch.arange(images) % 3 == 2, -1, torch.arange(images) + images),
        "cfg_scale": torch.rand(images, generator=generator) * 4,
        "temperature": torch.rand(images, generator=generator) + 0.5,
        "top_k": torch.zeros(images),
        "top_p": torch.ones(images),
        "seed": torch.randint(-(2**62), 2**62, (images,), generator=generator),
        "index": torch.randint(0, 2**40, (images,), generator=generator),
        "position": torch.randint(0, 2**20, (images,), generator=generator),
    }
    types = {"temperature": torch.float32, "cfg_scale": torch.float32, "top_p": torch.float32}
    types |= dict.fromkeys(("seed", "index"), torch.int64)
    values = {name: torch.as_tensor(value) for name, value in {**made, **given}.items()}
    return {name: value.expand(images).to(types.get(name, torch.int32)).contiguous() for name, value in values.items()}


def _filters(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return parameters["temperature"], parameters["top_k"], parameters["top_p"]


def _margin(logits_IV: Tensor, temperature_I: Tensor, top_k_I: Tensor, top_p_I: Tensor) -> float:
    """How near to p a sum of probabilities before a code comes, in fp64."""
    margin = INF
    kept_IV = reference.filter_logits(logits_IV, temperature_I, top_k_I, torch.ones_like(top_p_I))
    for logits, p in zip(kept_IV.double(), top_p_I.tolist(), strict=True):
        before = logits.sort(descending=True).values.softmax(-1).cumsum(-1)[:-1]
        if 0 < p < 1 and len(before):
            margin = min(margin, (before - p).abs().min().item())
    return margin


def _mixed(logits: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    cond = logits[parameters["cond_row"].long()]
    null = logits[parameters["null_row"].clamp(min=0).long()]
    guided = reference.cfg_mix(cond, null, parameters["cfg_scale"][:, None])
    return torch.where(parameters["null_row"][:, None] >= 0, guided, cond)


def _assert_as_the_reference(logits: Tensor, parameters: dict[str, Tensor]) -> None:
    """Equal filtered logits of the mixed rows, and equal codes."""
    mixed, filters = _mixed(logits, parameters), _filters(parameters)
    torch.testing.assert_close(
        gpu.filter_logits(mixed, *filters), reference.filter_logits(mixed, *filters), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(gpu.cfg_sample(logits, *parameters.values()), reference.cfg_sample(logits, *parameters.values()))


def _pick(options: list[float], images: int, generator: torch.Generator) -> Tensor:
    return torch.tensor(options)[torch.randint(len(options), (images,), generator=generator)]


@given(
    images=st.integers(1, 3),
    vocabulary=st.integers(1, 16) | st.integers(17, 400),
    seed=st.integers(0, 2**32),
    distinct=st.sampled_from([1, 3, 20, None]),
    dropped=st.sampled_from([0.0, 0.0, 0.5, 0.99]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_codes_are_the_references(
    images: int, vocabulary: int, seed: int, distinct: int | None, dropped: float
) -> None:
    """Ties on purpose (few distinct logits, rounded further by high temperatures), k and p at their ends, -inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * images, vocabulary, generator=generator) * 4
    if distinct is not None:
        logits = logits[:, :distinct][:, torch.randint(min(distinct, vocabulary), (vocabulary,), generator=generator)]
    unguided = torch.rand(images, generator=generator) < (0.3 if dropped == 0 else 2)  # -inf - -inf is NaN
    logits[torch.rand(logits.shape, generator=generator) < dropped] = -INF
    parameters = _parameters(
        images,
        generator,
        null_row=torch.where(unguided, -1, torch.arange(images) + images),
        cfg_scale=_pick([0.0, 1.0, 1.7, 4.0], images, generator),
        temperature=_pick([0.0, 1e-6, 1.0, 0.7, 5.0], images, generator),
        top_k=_pick([0, 1, 2, 7, vocabulary - 1, vocabulary, 2**31 - 1], images, generator),
        top_p=_pick([0.0, 0.1, 0.53, 0.9, 1.0], images, generator),
    )
    # Where p is nearer than rounding to a sum before a code, either may keep the code: see the README.
    assume(_margin(_mixed(logits, parameters), *_filters(parameters)) > 1e-5)
    _assert_as_the_reference(logits, parameters)


WIDE = {"top_k": [0, 300, 1, 5], "top_p": [1.0, 1.0, 0.9, 0.5]}


@pytest.mark.parametrize("vocabulary", [1025, 4097, 16384])
def test_wide_rows(vocabulary: int) -> None:
    """Of every tile that holds a row; rows of 1,025 and 4,097 end inside a step."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(8, vocabulary, generator=generator) * 3
    _assert_as_the_reference(logits, _parameters(4, generator, **WIDE))


@pytest.mark.parametrize("vocabulary", [9000, 16385])
def test_rows_above_the_widest_tile(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read again in every step: the reference's results, and the bits of a row in registers where both can."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(-30, 30, (4, vocabulary), generator=generator) / 8  # ties in every block
    parameters = _parameters(2, generator, top_k=[6000, 0], top_p=[0.77, 0.3])
    if vocabulary <= gpu.TILES[-2].block:
        monkeypatch.setattr(gpu, "tile_of", lambda vocabulary: gpu.TILES[-1])
    assert gpu.tile_of(vocabulary).loop
    _assert_as_the_reference(logits, parameters)


def test_ties_of_the_nucleus_go_by_code() -> None:
    """Of 1,000 equal logits p = 0.3 keeps the first 301: the sum before code 300 is 0.3 or less, by rounding p."""
    for p, stay in ((0.3, 301), (0.2995, 300), (0.0, 1), (0.9999, 1000), (1.0, 1000)):
        kept = torch.isfinite(gpu.filter_logits(torch.zeros(1, 1000), *_limits(p=p)))[0]
        assert kept.tolist() == [True] * stay + [False] * (1000 - stay)


def test_a_sum_of_exactly_p_stays() -> None:
    """Masses 1, 1/2 and 1/2, which have no rounding: before code 1 the sum is 1/2, and p = 1/2 does not drop it."""
    logits = torch.tensor([[0.0, -0.6931472, -0.6931472]])
    assert torch.isfinite(gpu.filter_logits(logits, *_limits(p=0.5)))[0].tolist() == [True, True, False]


def _limits(temperature: float = 1.0, k: int = 0, p: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([temperature]), torch.tensor([k], dtype=torch.int32), torch.tensor([p])


EXTREMES = {
    "huge": [3e38, -3e38, 1e38, 0.0, 3e38],
    "tiny": [1e-45, -1e-45, 0.0, -0.0, 1e-38],
    "zeros": [-0.0, 0.0, -0.0, -1.0, 0.0],
    "infinite": [-INF, 1.0, INF, INF, 0.0],
    "nothing": [-INF] * 5,
    "one": [-INF, -INF, -3e38, -INF, -INF],
    "NaN": [0.0, 1.0, NAN, NAN, 2.0],
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (2, 1.0), (0, 0.3), (3, 0.6)])
def test_extreme_logits(name: str, k: int, p: float) -> None:
    """One image at temperature 1 and one at 0, which divides by 1e-5 and makes infinities."""
    logits = torch.tensor([EXTREMES[name]] * 2)
    generator = torch.Generator().manual_seed(5)
    parameters = _parameters(2, generator, null_row=-1, temperature=[1.0, 0.0], top_k=k, top_p=p)
    assert torch.equal(gpu.cfg_sample(logits, *parameters.values()), reference.cfg_sample(logits, *parameters.values()))
    if name != "NaN":
        filters = _filters(parameters)
        assert torch.equal(gpu.filter_logits(logits, *filters), reference.filter_logits(logits, *filters))


@pytest.mark.parametrize("value", [-INF, INF])
def test_the_lowest_code_wins_across_steps(value: float) -> None:
    logits = torch.full((1, 2500), -INF)
    logits[0, [7, 9, 2400]] = value
    parameters = _parameters(1, torch.Generator(), null_row=-1)
    assert gpu.cfg_sample(logits, *parameters.values()).item() == (7 if value > 0 else 0)


def test_an_image_does_not_depend_on_the_others() -> None:
    """Alone, with its rows elsewhere in another memory layout and parameters that are views at odd offsets."""
    generator = torch.Generator().manual_seed(3)
    images, vocabulary = 5, 203
    logits = torch.randn(2 * images, vocabulary, generator=generator) * 3
    top_k, top_p = torch.tensor([0, 9, 0, 9, 1]), torch.tensor([1.0, 1.0, 0.8, 0.6, 1.0])
    parameters = _parameters(images, generator, top_k=top_k, top_p=top_p)
    together = gpu.cfg_sample(logits, *parameters.values())
    filtered = gpu.filter_logits(_mixed(logits, parameters), *_filters(parameters))
    for image in (3, 0, 2):
        alone = {name: value[image : image + 1] for name, value in parameters.items()}
        pair = torch.full((vocabulary, 5), NAN).t()
        pair[3], pair[1] = logits[alone["cond_row"]][0], logits[alone["null_row"].clamp(min=0)][0]
        alone["cond_row"] = torch.tensor([3], dtype=torch.int32)
        alone["null_row"] = torch.where(alone["null_row"] < 0, -1, 1).int()
        assert torch.equal(gpu.cfg_sample(pair, *alone.values()), together[image : image + 1])
        again = gpu.filter_logits(_mixed(pair, alone), *_filters(alone))
        assert torch.equal(again, filtered[image : image + 1])
    shared = logits[:1].expand(2 * images, -1)  # one row in memory
    assert torch.equal(
        gpu.cfg_sample(shared, *parameters.values()), reference.cfg_sample(shared.clone(), *parameters.values())
    )


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 150 guided draws over 4 codes; its 1 - 1e-6 quantile is 30.7. (A million: test_cfg_sample.py, on
    the reference, whose codes these are.)"""
    draws = 150
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, generator=generator)
    parameters = _parameters(
        draws, generator, cond_row=0, null_row=1, cfg_scale=2.5, temperature=1.0, seed=9, index=torch.arange(draws)
    )
    codes = gpu.cfg_sample(logits, *parameters.values())
    expected = reference.cfg_mix(logits[0], logits[1], 2.5).softmax(-1) * draws
    assert ((torch.bincount(codes, minlength=4) - expected) ** 2 / expected).sum() < 30.7


@given(seed=st.integers(0, 2**32), exponent=st.integers(-120, 120), vocabulary=st.integers(1, 3000))
@settings(max_examples=10, deadline=None)
def test_mixing_rounds_as_the_reference(seed: int, exponent: int, vocabulary: int) -> None:
    """Every bit (but a zero's sign), with a scale for each row, each element and all."""
    generator = torch.Generator().manual_seed(seed)
    cond, null = torch.randn(2, 2, 3, vocabulary, generator=generator) * 2.0**exponent
    for shape in ((), (2, 1, 1), (3, 1), (vocabulary,), (2, 3, vocabulary)):
        scale = torch.rand(shape, generator=generator) * 8 - 2
        assert torch.equal(gpu.cfg_mix(cond, null, scale), reference.cfg_mix(cond, null, scale))


def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher on tensors without data, as in a CUDA graph's capture: a grid that depends on the images alone."""
    launches: list[tuple[int, ...]] = []
    monkeypatch.setattr(Kernel, "launch", lambda self, grid, *_: launches.append(grid))
    monkeypatch.setattr(gpu, "aligned", lambda x: x)
    monkeypatch.setattr("retinar.kernels.rows.aligned", lambda x: x)
    for images in (0, 1, 7):
        parameters = _parameters(images, torch.Generator())
        empty = [each.to("meta") for each in parameters.values()]
        assert gpu.cfg_sample(torch.empty(14, 16384, device="meta"), *empty).shape == (images,)
    assert launches == [(1,), (7,)]


@given(vocabulary=st.integers(1, 2**17), vectors=st.booleans(), arch=st.sampled_from(ARCHITECTURES))
def test_what_launchers_choose_is_compiled(vocabulary: int, vectors: bool, arch: int) -> None:
    tile = gpu.tile_of(vocabulary)
    assert tile.loop or tile.block >= vocabulary
    chosen = tuple(gpu._constants(tile, vectors).items())
    for kernel in (gpu.FILTER, gpu.SAMPLE):
        assert chosen in {each.constants for each in kernel.variants[arch]}
