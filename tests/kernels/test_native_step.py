"""The compiled decoder on every instruction set of this machine: errors, what it writes, and bits that depend on a row
alone. What it draws from its logits is in test_native_draws.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.decode_step.compose import compose
from retinar.kernels.decode_step.reference import embed
from retinar.kernels.decode_step.spec import DECODE_STEP, make_weights
from retinar.kernels.linear.reference import linear
from retinar.kernels.native import native_module
from retinar.kernels.paged_attention.reference import attend, plan_rows
from retinar.kernels.rms_norm.reference import rms_norm
from tests.kernels.test_ops import assert_within, change

NATIVE, MISSING = native_module()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))
EVERY_ISA = ("portable", "avx2", "avx512", "avx512_bf16")
ISAS = NATIVE.isas() if NATIVE else ["none"]  # "none": so that the reason above is said

every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

#: layers, heads, groups, dim, hidden, vocabulary; the pages' slots; the rows' positions.
Case = dict[str, int]
ENDS = (0, 1, 62, 63, 64, 1024)
CASES: dict[str, tuple[tuple[int, int, int, int, int, int], int, tuple[int, ...]]] = {
    "dim4": ((1, 1, 1, 4, 7, 11), 1, (0, 1, 2, 62, 64, 70)),
    "dim12": ((2, 3, 1, 12, 61, 101), 5, (*ENDS[:5], 5, 6)),
    "dim20": ((2, 4, 2, 20, 53, 67), 16, (15, 16, 17, 0, 31, 47, 62, 63, 64, 65, 1, 1024, 2)),
    "dim64": ((2, 2, 1, 64, 127, 257), 64, ENDS),
    "dim100": ((1, 4, 2, 100, 131, 199), 1024, (1023, *ENDS)),
    "dim128": ((1, 2, 2, 128, 97, 131), 16, ENDS[3:]),
    "rows65": ((1, 2, 1, 8, 29, 37), 5, tuple(i * 7 % 72 for i in range(65))),
}


def sizes(name: str) -> Case:
    return dict(zip(("layers", "heads", "groups", "dim", "hidden", "vocabulary"), CASES[name][0], strict=True))


class Step(NamedTuple):
    """One step's arguments, and its rows' slots of the caches."""

    k_cache: Tensor
    v_cache: Tensor
    inputs: ops.StepInputs
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def caches(self) -> list[Tensor]:
        return [each for each in (self.k_cache, self.v_cache, self.k_scale, self.v_scale) if each is not None]

    def copy(self) -> Step:
        return Step(*(each.clone() if isinstance(each, Tensor) else each for each in self))

    def slots(self) -> tuple[Tensor, Tensor]:
        """Page and slot that each row writes."""
        page, position = self.k_cache.shape[2], self.inputs.positions_B.long()
        return self.inputs.block_table_BM.gather(1, (position // page)[:, None])[:, 0].long(), position % page

    def written(self) -> list[Tensor]:
        page, slot = self.slots()
        return [each[:, page, slot] for each in self.caches]


class World:
    """A model and rows at positions, each with a past of its own; `step` lays chosen rows out in pages."""

    def __init__(self, case: Case, dtype: torch.dtype, positions: tuple[int, ...]) -> None:
        self.case, self.dtype, self.positions = case, dtype, positions
        generator = torch.Generator().manual_seed(3)
        side = max(1, int(max(positions) ** 0.5 + 0.999))
        rope = ops.rope_table(side, side, case["dim"])
        self.weights = make_weights(case, dtype, generator)._replace(rope_NC2=rope)
        self.tokens = torch.randint(case["vocabulary"], (len(positions),), generator=generator)
        self.tokens[torch.tensor(positions) == 0] = 1  # a class
        shape = (2, len(positions), case["layers"], max(positions), case["groups"], case["dim"])
        self.past = torch.randn(shape, generator=generator).to(dtype)

    def step(
        self, page: int, rows: list[int] | None = None, *, seed: int = 0, padding: int = 0, int8: bool = False
    ) -> Step:
        """Pages in random order, one of them nobody's; unused slots hold NaN. ``padding``: rows behind the others that
        share a page. ``int8``: caches of the numbers rounded, unused slots 127 with the scale NaN."""
        rows = list(range(len(self.positions))) if rows is None else rows
        positions = [self.positions[row] for row in rows]
        needed = [position // page + 1 for position in positions]
        order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(seed)).int()
        nobody, scratch, own = order[0], order[1], order[2:].split(needed)
        table = torch.full((len(rows) + padding, max(needed)), int(nobody), dtype=torch.int32)
        table[len(rows) :] = scratch
        shape = (self.case["layers"], len(order), page, self.case["groups"], self.case["dim"])
        caches = [torch.full(shape, float("nan"), dtype=self.dtype) for _ in range(2)]
        for at, row in enumerate(rows):
            table[at, : needed[at]] = own[at]
            place = torch.arange(positions[at])
            for cache_LPSGD, past in zip(caches, self.past[:, row], strict=True):
                cache_LPSGD[:, table[at, place // page].long(), place % page] = past[:, : len(place)]
        scales: list[Tensor | None] = [None, None]
        if int8:
            caches, scales = map(list, zip(*(quantised_cache(each) for each in caches), strict=True))
        image = torch.arange(len(rows))
        inputs = ops.StepInputs(
            tokens_B=torch.cat([self.tokens[rows], torch.zeros(padding, dtype=torch.int64)]),
            positions_B=torch.tensor(positions + [0] * padding, dtype=torch.int32),
            block_table_BM=table,
            cond_row_I=image.int(),
            null_row_I=torch.full((len(rows),), -1, dtype=torch.int32),
            cfg_scale_I=torch.ones(len(rows)),
            temperature_I=torch.full((len(rows),), 0.9),
            top_k_I=torch.tensor([row % 3 * 4 for row in rows], dtype=torch.int32),
            top_p_I=torch.tensor([1 - row % 2 * 0.1 for row in rows]),
            seed_I=torch.tensor(rows) + 2**62,
            index_I=torch.tensor(rows) * 3,
        )
        return Step(caches[0], caches[1], inputs, *scales)


def quantised_cache(cache_LPSGD: Tensor) -> tuple[Tensor, Tensor]:
    int8, scale = quantise(cache_LPSGD.nan_to_num().double())
    unused = cache_LPSGD.isnan()
    return int8.masked_fill(unused, 127).to(torch.int8), scale[..., 0].masked_fill(unused[..., 0], torch.nan).float()


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers to 127, and the scale of each last dimension."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.clamp(min=1e-30)).round(), scale


def rounded(x: Tensor) -> Tensor:
    int8, scale = quantise(x)
    return int8 * scale


@cache
def world(name: str, dtype: torch.dtype) -> World:
    return World(sizes(name), dtype, CASES[name][2])


def bits(x: Tensor) -> Tensor:
    """For comparisons in which NaN equals NaN."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_only_own_slots_changed(before: Step, after: Step) -> None:
    page, slot = after.slots()
    for old, new in zip(before.caches, after.caches, strict=True):
        expected = bits(old).clone()
        expected[:, page, slot] = bits(new)[:, page, slot]
        assert torch.equal(bits(new), expected)
        assert not torch.equal(bits(new), bits(old))


@pytest.mark.parametrize("isa", [*EVERY_ISA, "avx1024"])
def test_other_instruction_sets_are_refused(isa: str) -> None:
    weights = world("dim4", torch.float32).weights
    if isa in ISAS:
        ops.NativeDecoder(weights, isa=isa)
        return
    with pytest.raises(ValueError, match=f"instruction set {isa} is unknown or does not run on this processor"):
        ops.NativeDecoder(weights, isa=isa)


class Expected(NamedTuple):
    truth: Tensor
    plain: Tensor
    written: list[Tensor]  # truth, and what the reference writes in the dtype
    reference_written: list[Tensor]


@cache
def expected(name: str, dtype: torch.dtype) -> Expected:
    """Logits: the reference in fp64, and plain torch. Caches: the reference in fp64, and in the dtype."""
    here = world(name, dtype)
    step = here.step(CASES[name][1])
    plain = DECODE_STEP.plain(
        {"weights": here.weights, "k_cache": step.k_cache, "v_cache": step.v_cache, "step": step.inputs}
    )[0]
    own = step.copy()
    ops.decode_step(here.weights, own.k_cache, own.v_cache, own.inputs, backend="reference")
    wide_step = Step(*change(list(step[:3]), lambda x: x.double()), None, None)
    weights = change(here.weights, lambda x: x.double())
    truth = ops.decode_step(weights, *wide_step[:3], backend="reference")[1]
    return Expected(truth, plain, wide_step.written(), own.written())


@every_isa
@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_within_the_error_budget(name: str, dtype: torch.dtype, isa: str) -> None:
    """Logits, and the new keys and values; nothing else is written, and unused slots (NaN) are not read.

    Of several rows each: the rounding of one row's few numbers is luck. One row alone has the bits that it has here.
    """
    here, wanted = world(name, dtype), expected(name, dtype)
    before = here.step(CASES[name][1])
    after = before.copy()
    logits_BV = ops.NativeDecoder(here.weights, isa=isa).step(*after)[1]
    assert_within(logits_BV, wanted.plain, wanted.truth, dtype, DECODE_STEP.budget.forward)
    for own, reference, truth in zip(after.written(), wanted.reference_written, wanted.written, strict=True):
        assert_within(own, reference, truth, dtype, DECODE_STEP.budget.forward)
    assert_only_own_slots_changed(before, after)


Kind = tuple[torch.dtype, bool, bool]
KINDS: dict[str, Kind] = {  # dtype, int8 weights, int8 cache
    "fp32": (torch.float32, False, False),
    "bf16": (torch.bfloat16, False, False),
    "int8": (torch.bfloat16, True, True),
    "fp32-int8": (torch.float32, True, False),
    "fp32-int8cache": (torch.float32, False, True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Result(NamedTuple):
    codes: Tensor
    logits: Tensor
    written: list[Tensor]


def run(decoder: ops.NativeDecoder, step: Step) -> Result:
    codes_I, logits_BV = decoder.step(*step)
    assert torch.isfinite(logits_BV).all()
    return Result(codes_I, logits_BV, step.written())


def assert_rows(found: Result, wanted: Result, rows: list[int]) -> None:
    """The first rows of a step are, bit by bit, these of another."""
    count = len(rows)
    assert torch.equal(found.codes[:count], wanted.codes[rows])
    assert torch.equal(found.logits[:count], wanted.logits[rows])
    for one, other in zip(found.written, wanted.written, strict=True):
        assert torch.equal(one[:, :count], other[:, rows])


@every_isa
@every_kind
@pytest.mark.parametrize("name", ["dim20", "dim12"])
def test_a_row_depends_on_itself_alone(name: str, kind: str, isa: str) -> None:
    """Equal bits for 1, 2 and 3 threads, alone and in a batch, in any order, for any page size, beside padding."""
    dtype, int8, int8_cache = KINDS[kind]
    here, page = world(name, dtype), CASES[name][1]
    one, two, three = (ops.NativeDecoder(here.weights, int8=int8, threads=n, isa=isa) for n in (1, 2, 3))
    everyone = list(range(len(here.positions)))
    wanted = run(one, here.step(page, int8=int8_cache))
    for decoder in (two, three):
        assert_rows(run(decoder, here.step(page, int8=int8_cache)), wanted, everyone)
    for row in everyone:
        decoder = (one, two, three)[row % 3]
        assert_rows(run(decoder, here.step(page, [row], int8=int8_cache)), wanted, [row])
    for other in (1, 5, 16, 64, 1024):
        rows = everyone[::-1] if other == 16 else everyone[other % 3 :] + everyone[: other % 3]
        assert_rows(run(two, here.step(other, rows, seed=other, int8=int8_cache)), wanted, rows)
    for padding in (1, 2, 15):
        step = here.step(page, seed=padding, padding=padding, int8=int8_cache)
        before = step.copy()
        assert_rows(run(three, step), wanted, everyone)
        assert_only_own_slots_changed(before, step)


@every_isa
@every_kind
def test_every_number_of_rows(kind: str, isa: str) -> None:
    """1 to 65 rows: blocks of rows in registers and what is left over; no bit depends on the number."""
    dtype, int8, int8_cache = KINDS[kind]
    here = world("rows65", dtype)
    decoder = ops.NativeDecoder(here.weights, int8=int8, isa=isa)
    wanted = run(decoder, here.step(16, int8=int8_cache))
    for count in range(1, 65):
        rows = list(range(65 - count, 65))
        assert_rows(run(decoder, here.step(16, rows, int8=int8_cache)), wanted, rows)


@every_isa
@pytest.mark.parametrize("threads", [1, 2])
def test_no_images(threads: int, isa: str) -> None:
    here = world("dim12", torch.float32)
    decoder = ops.NativeDecoder(here.weights, threads=threads, isa=isa)
    step = here.step(5)
    wanted = run(decoder, step.copy())
    none = step.inputs._replace(**{name: getattr(step.inputs, name)[:0] for name in step.inputs._fields[3:]})
    found = run(decoder, step._replace(inputs=none))
    assert found.codes.shape == (0,)
    assert torch.equal(found.logits, wanted.logits)


def test_pinned_threads_change_nothing() -> None:
    here = world("dim12", torch.bfloat16)
    plain, pinned = (run(ops.NativeDecoder(here.weights, threads=2, pin=pin), here.step(16)) for pin in (False, True))
    assert_rows(pinned, plain, list(range(len(here.positions))))


def emulated(here: World, step: Step, int8: bool) -> Tensor:
    """Logits in fp64 of the reference whose products (``int8``) round weights and activations to int8, over the cache
    as it is, in which new keys and values are rounded where it has scales."""

    def round_linear(x: Tensor, weight: Tensor, norm: Tensor | None, *rest: Any) -> Tensor:
        x = x if norm is None else rms_norm(x, norm, here.weights.eps)
        return linear(rounded(x), rounded(weight), None, *rest)

    weights = change(here.weights, lambda x: x.double())
    positions_B = step.inputs.positions_B.long()
    rope_BC2 = weights.rope_NC2[positions_B]
    page, slot = step.slots()
    caches = [
        each.double() if scale is None else each.double() * scale.double()[..., None]
        for each, scale in ((step.k_cache, step.k_scale), (step.v_cache, step.v_scale))
    ]

    def attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        plan = plan_rows(step.inputs.block_table_BM, step.inputs.positions_B, k_cache.shape[1])
        if step.k_scale is None:
            return attend(q, k, v, k_cache, v_cache, plan, rope_BC2, q.shape[-1] ** -0.5)
        attend(q, k, v, k_cache, v_cache, plan, rope_BC2, 1.0)  # turns and writes
        for each in (k_cache, v_cache):
            each[page, slot] = rounded(each[page, slot])
        outs = []
        for row, length in enumerate(plan.lengths):
            place = torch.arange(length)
            where = step.inputs.block_table_BM[row, place // k_cache.shape[1]].long(), place % k_cache.shape[1]
            repeat = q.shape[1] // k.shape[1]
            keys, values = (each[where].repeat_interleave(repeat, 1) for each in (k_cache, v_cache))
            turned = turn(q[row], rope_BC2[row])
            scores = torch.einsum("hd,nhd->hn", turned, keys) * q.shape[-1] ** -0.5
            outs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values))
        return torch.stack(outs)

    x_BE = embed(weights, step.inputs.tokens_B, positions_B)
    return compose(weights, (caches[0], caches[1]), x_BE, round_linear if int8 else linear, attention)


def turn(q_HD: Tensor, rope_C2: Tensor) -> Tensor:
    pairs = torch.view_as_complex(q_HD.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(rope_C2.contiguous())).flatten(-2)


@cache
def emulated_once(name: str, kind: str) -> Tensor:
    dtype, int8, int8_cache = KINDS[kind]
    here = world(name, dtype)
    return emulated(here, here.step(CASES[name][1], int8=int8_cache), int8)


@every_isa
@pytest.mark.parametrize("kind", ["int8", "fp32-int8", "fp32-int8cache"])
@pytest.mark.parametrize("name", ["dim20", "dim64", "dim100", "rows65"])
def test_int8_costs_what_rounding_to_int8_costs(name: str, kind: str, isa: str) -> None:
    """Against the truth without int8: within the budget, where the same rounding in fp64 is the yardstick. In fp32 it
    is that rounding and no other, but for numbers so near a half that they go the other way."""
    dtype, int8, int8_cache = KINDS[kind]
    here, truth, plain = world(name, dtype), expected(name, dtype).truth, emulated_once(name, kind)
    before = here.step(CASES[name][1], int8=int8_cache)
    after = before.copy()
    logits_BV = ops.NativeDecoder(here.weights, int8=int8, isa=isa).step(*after)[1]
    assert_within(logits_BV, plain, truth, dtype, DECODE_STEP.budget.forward)
    if dtype == torch.float32:
        assert (logits_BV - plain).norm() < 0.05 * (plain - truth).norm()
    assert_only_own_slots_changed(before, after)


@every_isa
@every_dtype
def test_int8_cache_holds_keys_and_values(dtype: torch.dtype, isa: str) -> None:
    """int8 by scale is within half a step of what the other cache holds, the largest number is at 127, and the class
    token's key, all zeros, has the scale 0."""
    here = world("dim12", dtype)
    plain, int8 = here.step(5), here.step(5, int8=True)
    decoder = ops.NativeDecoder(here.weights, isa=isa)
    decoder.step(*plain)
    decoder.step(*int8)
    k, v, k_scale, v_scale = int8.written()
    for wide, found, scale in zip(plain.written(), (k, v), (k_scale, v_scale), strict=True):
        first = wide[0]  # of the first layer: what comes behind it has seen other attention
        error = (found[0].float() * scale[0][..., None] - first.float()).abs()
        assert (error <= scale[0][..., None] * 0.501 + first.float().abs() * torch.finfo(dtype).eps).all()
        assert (found[0].abs().amax(-1)[scale[0] > 0] == 127).all()
    assert here.positions[0] == 0
    assert (k_scale[:, 0] == 0).all() and (k[:, 0] == 0).all() and (v_scale[:, 0] > 0).all()


@every_isa
@pytest.mark.parametrize("dim", [2, 6, 14, 16, 34, 66])
def test_integer_sums_are_exact(dim: int, isa: str) -> None:
    """Without attention and feed-forward, logits are whole numbers times two scales: equal to torch's, to the last bit,
    on every instruction set; widths with a rest in every vector and in every group of four."""
    case = {"layers": 1, "heads": 1, "groups": 1, "dim": dim, "hidden": 5, "vocabulary": 83}
    generator = torch.Generator().manual_seed(dim)
    weights = make_weights({**case, "dim": 4, "heads": 1}, torch.float32, generator)
    whole = torch.randint(-9, 10, (83, dim), generator=generator).float()
    whole[:, 0] = 9
    zeros = {"wqkv": (3 * dim, dim), "wo": (dim, dim), "w13": (10, dim), "w2": (dim, 5)}
    output_VD = torch.randn(83, dim, generator=generator)
    output_VD[7] = 0
    weights = weights._replace(
        cls_embedding_CD=whole[:3],
        tok_embedding_VD=whole,
        **{name: [torch.zeros(shape)] for name, shape in zeros.items()},
        **{name: [torch.ones(dim)] for name in ("attention_norm", "ffn_norm")},
        norm_D=torch.ones(dim),
        output_VD=output_VD,
        rope_NC2=torch.ones(2, dim // 2, 2),
    )
    rows = 7
    inputs = ops.StepInputs(
        torch.arange(rows),
        torch.ones(rows, dtype=torch.int32),
        torch.arange(rows, dtype=torch.int32)[:, None],
        *(torch.zeros(0, dtype=each) for each in (torch.int32, torch.int32, torch.float32, torch.float32)),
        *(torch.zeros(0, dtype=each) for each in (torch.int32, torch.float32, torch.int64, torch.int64)),
    )
    caches = [torch.zeros(1, rows, 2, 1, dim) for _ in range(2)]
    logits_BV = ops.NativeDecoder(weights, int8=True, isa=isa).step(*caches, inputs)[1]
    mean = whole[:rows].square().sum(-1, keepdim=True).numpy() / np.float32(dim)  # torch's square root may round twice
    normed = whole[:rows] * torch.from_numpy(np.float32(1) / np.sqrt(mean + np.float32(weights.eps)))
    most = normed.abs().amax(-1, keepdim=True)
    x_int = (normed * torch.div(torch.tensor(127.0), most)).round()
    scale_V1 = output_VD.abs().amax(1, keepdim=True) / 127
    w_int = (output_VD / scale_V1.clamp(min=torch.finfo(torch.float32).tiny)).round()
    total = (x_int.double() @ w_int.double().t()).float()
    assert torch.equal(logits_BV, total * (scale_V1.t() * (most / 127)))


def _refusals() -> dict[str, tuple[str, Callable[[Step], Step]]]:
    def inputs(**changes: Callable[[Tensor], Tensor]) -> Callable[[Step], Step]:
        return lambda s: s._replace(
            inputs=s.inputs._replace(**{name: f(getattr(s.inputs, name)) for name, f in changes.items()})
        )

    return {
        "cache of another dtype": ("contiguous in torch.float32", lambda s: s._replace(k_cache=s.k_cache.bfloat16())),
        "values of another dtype": ("contiguous in torch.float32", lambda s: s._replace(v_cache=s.v_cache.double())),
        "fewer layers": (r"expected caches \[2, pages", lambda s: s._replace(k_cache=s.k_cache[:1])),
        "another shape": ("expected v_cache", lambda s: s._replace(v_cache=s.v_cache[:, :-1])),
        "another head dim": ("expected k_cache", lambda s: s._replace(k_cache=s.k_cache[..., :-1])),
        "strided cache": ("contiguous", lambda s: s._replace(k_cache=s.k_cache.repeat(1, 1, 1, 1, 2)[..., ::2])),
        "no cache": (r"expected caches \[2, pages", lambda s: s._replace(k_cache=s.k_cache[0])),
        "tokens of int32": ("expected int64 tokens", inputs(tokens_B=lambda x: x.int())),
        "no rows": ("expected int64 tokens", inputs(tokens_B=lambda x: x[:0])),
        "table of int64": ("expected an int32 block table", inputs(block_table_BM=lambda x: x.long())),
        "table without a row": ("expected an int32 block table", inputs(block_table_BM=lambda x: x[1:])),
        "positions of int64": ("expected int32 positions", inputs(positions_B=lambda x: x.long())),
        "top_p in fp64": ("expected top_p_I as torch.float32", inputs(top_p_I=lambda x: x.double())),
        "seeds of fewer images": ("expected seed_I as torch.int64", inputs(seed_I=lambda x: x[1:])),
        "rows of int64": ("expected cond_row_I as torch.int32", inputs(cond_row_I=lambda x: x.long())),
        "missing scales": ("scales", lambda s: s._replace(k_cache=s.k_cache.char(), v_cache=s.v_cache.char())),
        "one scale": ("contiguous in torch.int8", lambda s: s._replace(k_scale=torch.zeros(s.k_cache.shape[:-1]))),
        "scales without int8": (
            "contiguous in torch.int8",
            lambda s: s._replace(k_scale=torch.zeros(s.k_cache.shape[:-1]), v_scale=torch.zeros(s.k_cache.shape[:-1])),
        ),
        "scales of another shape": (
            "scales",
            lambda s: Step(s.k_cache.char(), s.v_cache.char(), s.inputs, *[torch.zeros(s.k_cache.shape)] * 2),
        ),
        "scales in fp64": (
            "scales",
            lambda s: Step(
                s.k_cache.char(), s.v_cache.char(), s.inputs, *[torch.zeros(s.k_cache.shape[:-1]).double()] * 2
            ),
        ),
    }


@pytest.mark.parametrize("name", _refusals())
def test_wrong_inputs_are_refused(name: str) -> None:
    """In one sentence, before anything is written."""
    message, damage = _refusals()[name]
    here = world("dim12", torch.float32)
    step = here.step(5)
    before = [bits(each).clone() for each in step.caches]
    with pytest.raises(ValueError, match=message) as caught:
        ops.NativeDecoder(here.weights).step(*damage(step))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(bits(each), old) for each, old in zip(step.caches, before, strict=True))


def test_seconds_of_each_phase() -> None:
    """Are added to, and change nothing; what cannot hold them is refused."""
    here = world("dim12", torch.bfloat16)
    decoder = ops.NativeDecoder(here.weights, threads=2)
    seconds = torch.full((len(decoder.phases),), 100.0, dtype=torch.float64)
    logits_BV = decoder.step(*here.step(5), seconds=seconds)[1]
    assert torch.equal(logits_BV, decoder.step(*here.step(5))[1])
    assert ((seconds >= 100) & (seconds < 160)).all() and seconds.sum() > 100 * len(seconds)
    for wrong in (seconds.float(), seconds[1:]):
        with pytest.raises(ValueError, match=r"expected seconds as torch\.float64 \[9\]"):
            decoder.step(*here.step(5), seconds=wrong)


@pytest.mark.parametrize(
    ("message", "options", "change_weights"),
    [
        ("at least one thread", {"threads": 0}, lambda w: w),
        ("takes float32 and bfloat16", {}, lambda w: change(w, lambda x: x.half())),
        ("expected norm_D", {}, lambda w: w._replace(norm_D=w.norm_D.bfloat16())),
        ("expected every wqkv", {}, lambda w: w._replace(wqkv=[w.wqkv[0], w.wqkv[1][:-1]])),
        ("rope", {}, lambda w: w._replace(rope_NC2=w.rope_NC2[:, :-1])),
        ("rope", {}, lambda w: w._replace(rope_NC2=w.rope_NC2.double())),
    ],
    ids=["threads", "dtype", "norm", "shapes", "rope's shape", "rope's dtype"],
)
def test_wrong_weights_are_refused(
    message: str, options: dict[str, Any], change_weights: Callable[[ops.DecodeWeights], ops.DecodeWeights]
) -> None:
    weights = change_weights(world("dim12", torch.float32).weights)
    with pytest.raises(ValueError, match=message):
        ops.NativeDecoder(weights, **options)


def _small() -> tuple[ops.DecodeWeights, dict[str, Any]]:
    inputs = DECODE_STEP.inputs(DECODE_STEP.cases[1], torch.float32, torch.Generator().manual_seed(3))
    return inputs["weights"], inputs


@every_isa
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["wqkv", "w13", "w2"])
def test_a_broken_weight_is_not_hidden(name: str, int8: bool, isa: str) -> None:
    """A number that is none reaches the logits, whatever maxima, softmax and roundings it goes through."""
    weights, inputs = _small()
    getattr(weights, name)[0][:] = float("nan")
    decoder = ops.NativeDecoder(weights, int8=int8, isa=isa)
    logits = decoder.step(inputs["k_cache"].clone(), inputs["v_cache"].clone(), inputs["step"])[1]
    assert logits.isnan().all()


@pytest.mark.parametrize(
    ("field", "add", "message"),
    [
        ("tokens_B", 10**6, "a class at position 0 and a code elsewhere"),
        ("positions_B", 9999, "positions that the rope table and the block table reach"),
        ("positions_B", -100, "positions that the rope table"),
        ("block_table_BM", 10**6, "pages of the cache in the block table"),
        ("cond_row_I", 99, "rows of the step for every image"),
        ("null_row_I", -99, "rows of the step for every image"),
    ],
)
def test_what_would_read_somewhere_else_is_refused(field: str, add: int, message: str) -> None:
    weights, inputs = _small()
    step = inputs["step"]
    bad = step._replace(**{field: getattr(step, field) + add})
    with pytest.raises(ValueError, match=f"step: expected {message}"):
        ops.NativeDecoder(weights).step(inputs["k_cache"].clone(), inputs["v_cache"].clone(), bad)
