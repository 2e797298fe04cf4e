"""decode_step on Triton where the walk over all ops does not go: bits, rows that fill up, static inputs, launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from retinar.bench.arguments import change, to_device
from retinar.kernels import ops
from retinar.kernels.decode_step import DecodeWeights, StepInputs
from retinar.kernels.decode_step.reference import embed
from retinar.kernels.decode_step.spec import make_weights
from retinar.kernels.decode_step.types import flatten
from retinar.kernels.dispatch import interpreting
from retinar.kernels.launch import FLOATS, Kernel

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1 (make test runs it)"
)

SIZES = {"layers": 2, "hidden": 40, "vocabulary": 96}
POSITIONS = (0, 15, 16, 63, 130, 255, 256, 300)  # of the images, at the ends of pages and of attention's splits
GUIDED = (True, True, False, True, True, True, False, True)
EVERYONE = list(range(len(POSITIONS)))
MODELS = {
    "fp32": ({**SIZES, "heads": 2, "groups": 2, "dim": 20}, torch.float32),
    "fp16": ({**SIZES, "heads": 4, "groups": 2, "dim": 32}, torch.float16),
}


class Step:
    """Arguments of one step of some images, and where their numbers are in the caches."""

    def __init__(self, weights: DecodeWeights, caches: list[Tensor], inputs: StepInputs, images: list[int]) -> None:
        self.weights, self.caches, self.inputs, self.images = weights, caches, inputs, images

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        return ops.decode_step(self.weights, *self.caches, self.inputs, backend=backend)

    def flat(self) -> tuple[Any, ...]:
        return flatten(self.weights, (self.caches[0], self.caches[1]), self.inputs)

    def found(self, codes_I: Tensor, logits_BV: Tensor) -> dict[int, list[Tensor]]:
        """What belongs to each image: its code, its rows' logits, and their slots of the caches, bit by bit."""
        page, each = self.caches[0].shape[2], {}
        for at, image in enumerate(self.images):
            rows = [row for row in (int(self.inputs.cond_row_I[at]), int(self.inputs.null_row_I[at])) if row >= 0]
            place = torch.arange(POSITIONS[image] + 1)
            pages = [self.inputs.block_table_BM[row, place // page].long() for row in rows]
            each[image] = [codes_I[at], *logits_BV[rows]]
            each[image] += [cache[:, where, place % page] for cache in self.caches for where in pages]
        return each


class World:
    """Images at `POSITIONS` with parameters of their own; `step` lays chosen ones out in pages."""

    def __init__(self, name: str) -> None:
        self.case, self.dtype = MODELS[name]
        generator = torch.Generator().manual_seed(3)
        weights = make_weights(self.case, self.dtype, generator)
        self.weights = weights._replace(rope_NC2=ops.rope_table(18, 18, self.case["dim"]))
        self.tokens = torch.randint(2, self.case["vocabulary"], (len(POSITIONS),), generator=generator)
        shape = (2, 2, len(POSITIONS), self.case["layers"], max(POSITIONS), self.case["groups"], self.case["dim"])
        self.past = torch.randn(shape, generator=generator).to(self.dtype)  # keys and values, conditional and null rows

    def step(self, images: list[int], page: int, padding: int = 0, seed: int = 0) -> Step:
        """``padding``: rows behind the live ones that share a page, and one image that draws from the first of them."""
        guided = [at for at, image in enumerate(images) if GUIDED[image]]
        rows = [(image, 0) for image in images] + [(images[at], 1) for at in guided]
        columns = max(POSITIONS[image] for image in images) // page + 1
        needed = [POSITIONS[image] // page + 1 for image, _ in rows]
        order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(seed)).int().tolist()
        nobody, scratch, *pages = order
        shape = (self.case["layers"], len(order), page, self.case["groups"], self.case["dim"])
        caches = [torch.full(shape, float("nan"), dtype=self.dtype) for _ in range(2)]
        table = torch.full((len(rows) + padding, columns), nobody, dtype=torch.int32)
        table[len(rows) :, 0] = scratch
        for row, (image, null) in enumerate(rows):
            own, pages = pages[: needed[row]], pages[needed[row] :]
            table[row, : len(own)] = torch.tensor(own)
            place = torch.arange(POSITIONS[image])
            for cache, past in zip(caches, self.past[:, null, image], strict=True):
                cache[:, table[row, place // page].long(), place % page] = past[:, : len(place)]
        first = [image % 2 if not null else 2 for image, null in rows]  # the class of those at position 0
        tokens = [self.tokens[image] if POSITIONS[image] else first[row] for row, (image, _) in enumerate(rows)]
        null_row = torch.full((len(images),), -1, dtype=torch.int32)
        null_row[guided] = torch.arange(len(images), len(rows), dtype=torch.int32)
        number = torch.tensor(images)
        inputs = StepInputs(
            tokens_B=torch.tensor(tokens + [0] * padding),
            positions_B=torch.tensor([POSITIONS[image] for image, _ in rows] + [0] * padding, dtype=torch.int32),
            block_table_BM=table,
            cond_row_I=torch.arange(len(images), dtype=torch.int32),
            null_row_I=null_row,
            cfg_scale_I=1.5 + 0.1 * number,
            temperature_I=0.8 + 0.1 * (number % 3),
            top_k_I=(30 * (number % 2)).int(),
            top_p_I=1 - 0.1 * (number % 4),
            seed_I=number + 2**62,
            index_I=number * 3,
        )
        if padding:
            filler = len(rows), -1, 1.0, 1.0, 0, 1.0, 0, 0
            images_of = [torch.cat([x, x.new_tensor([y])]) for x, y in zip(inputs[3:], filler, strict=True)]
            inputs = StepInputs(*inputs[:3], *images_of)
        return Step(self.weights, caches, inputs, images)


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {name: World(name) for name in MODELS}


def assert_equal(found: dict[int, list[Tensor]], expected: dict[int, list[Tensor]]) -> None:
    for image, tensors in found.items():
        for one, other in zip(tensors, expected[image], strict=True):
            assert torch.isfinite(one).all() and torch.equal(one, other), image


@pytest.mark.parametrize("name", MODELS)
def test_an_image_depends_on_itself_alone(name: str, worlds: dict[str, World]) -> None:
    """Code, logits and cache bit by bit: alone and in a batch, at any place, for every page size, guided or not."""
    world, expected = worlds[name], {}
    for image in EVERYONE:
        alone = world.step([image], 16)
        expected |= alone.found(*alone.run("triton"))
    batches = (EVERYONE[4:7], 16), (EVERYONE[:3], 64), (EVERYONE, 256), (EVERYONE[::-1], 1024)
    for images, page in batches if name == "fp32" else batches[::2]:
        step = world.step(images, page, seed=page)
        assert_equal(step.found(*step.run("triton")), expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_that_fill_up_change_no_bit(backend: str, worlds: dict[str, World]) -> None:
    """Up to another block of the products' rows; they may all write into the slot that they share."""
    plain = worlds["fp32"].step([1, 4, 0], 16)
    expected = plain.found(*plain.run(backend))
    for padding in (1, 2, 15):
        step = worlds["fp32"].step([1, 4, 0], 16, padding, seed=padding)
        before = [cache.clone() for cache in step.caches]
        codes_I, logits_BV = step.run(backend)
        assert_equal(step.found(codes_I, logits_BV), expected)
        assert torch.equal(logits_BV[-padding:], logits_BV[-1:].expand(padding, -1))
        assert codes_I.shape == (4,)
        scratch = int(step.inputs.block_table_BM[-1, 0])
        for now, then in zip(step.caches, before, strict=True):
            assert torch.isfinite(now[:, scratch, 0]).all()
            then[:, scratch, 0] = now[:, scratch, 0]
            for row in range(len(step.inputs.tokens_B) - padding):
                position = int(step.inputs.positions_B[row])
                at = int(step.inputs.block_table_BM[row, position // 16]), position % 16
                then[:, at[0], at[1]] = now[:, at[0], at[1]]
            assert torch.equal(now.nan_to_num(9), then.nan_to_num(9))  # and nothing else was written


@pytest.mark.parametrize("backend", ["triton", "blas"])
def test_inputs_changed_in_place_count(backend: str, worlds: dict[str, World]) -> None:
    """As a CUDA graph's are: nothing is kept from the step that was first made of the buffers."""
    one, two = (worlds["fp32"].step(images, 64, seed=images[0]) for images in ([0, 3, 5], [7, 1, 4]))
    one.inputs = one.inputs._replace(block_table_BM=one.inputs.block_table_BM.repeat(1, 2)[:, :5].contiguous())
    expected = two.found(*two.run(backend))
    two = worlds["fp32"].step([7, 1, 4], 64, seed=7)
    buffers = change(one.inputs, Tensor.clone)
    pool = max(len(step.caches[0][0]) for step in (one, two))
    caches = [cache.new_zeros(len(cache), pool, *cache.shape[2:]) for cache in one.caches]
    for step in (one, two):
        for buffer, values in zip([*caches, *buffers], [*step.caches, *step.inputs], strict=True):
            if buffer.dim() == 5:
                buffer[:, : values.shape[1]] = values
            else:
                buffer.copy_(values)
        drawn = ops.decode_step(worlds["fp32"].weights, *caches, buffers, backend=backend)
    assert_equal(Step(two.weights, caches, two.inputs, two.images).found(*drawn), expected)


@pytest.mark.parametrize("backend", ["triton", "blas"])
def test_codes_are_drawn_from_the_logits(backend: str, worlds: dict[str, World]) -> None:
    """With the position of each image's conditional row, wherever that is."""
    step = worlds["fp32"].step(EVERYONE, 64)
    rows = len(step.inputs.tokens_B)
    step.inputs = step.inputs._replace(cond_row_I=torch.arange(8, dtype=torch.int32).flip(0) + rows - 8)
    codes_I, logits_BV = step.run(backend)
    position_I = step.inputs.positions_B[step.inputs.cond_row_I.long()]
    assert torch.equal(codes_I, ops.cfg_sample(logits_BV, *step.inputs[3:], position_I, backend="reference"))


@pytest.mark.parametrize("backend", ["triton", "blas", "reference"])
def test_no_images_and_more_images_than_rows(backend: str, worlds: dict[str, World]) -> None:
    step = worlds["fp32"].step([1, 6], 64)
    pick = torch.tensor([0, 0, 1, 1, 0, 1, 0])
    for which, cond_row in ((pick[:0], pick[:0]), (pick, pick)):
        inputs = StepInputs(*step.inputs[:3], *(each[which] for each in step.inputs[3:]))
        step.inputs = inputs._replace(cond_row_I=cond_row.int())
        codes_I, logits_BV = step.run(backend)
        assert codes_I.shape == which.shape and logits_BV.shape == (3, 96)
        step = worlds["fp32"].step([1, 6], 64)
    assert len(set(codes_I[pick == 1].tolist())) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 100, 520])
def test_embeddings(width: int, dtype: torch.dtype) -> None:
    """Every bit, out of tables of any strides; and the images' positions."""
    from retinar.kernels.decode_step.gpu import begin

    generator = torch.Generator().manual_seed(width)
    others = make_weights(MODELS["fp32"][0], dtype, generator)
    classes, codes = (torch.randn(count, width, generator=generator).to(dtype) for count in (3, 11))
    positions = torch.tensor([0, 4, 0, 1, 2**31 - 1], dtype=torch.int32)
    tokens, cond_row = torch.tensor([2, 10, 0, 0, 3]), torch.tensor([4, 1, 1, 0, 3, 2, 4], dtype=torch.int32)
    inputs = StepInputs(tokens, positions, *[cond_row] * 9)
    for change_table in (lambda x: x, _wider, lambda x: x.t().contiguous().t()):
        weights = others._replace(cls_embedding_CD=change_table(classes), tok_embedding_VD=change_table(codes))
        begun = begin(weights, inputs)
        assert torch.equal(begun.x_BE, embed(weights, tokens, positions.long()))
        assert torch.equal(begun.position_I, positions[cond_row.long()])


def _wider(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, float("nan"))[:, :3]], 1)[:, : x.shape[1]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, list[int]]]]:
    """(kernel, addresses of its tensors) of each launch, while no kernel runs."""
    found: list[tuple[str, list[int]]] = []

    def note(self: Kernel, grid: Any, arguments: tuple[Any, ...], *others: Any) -> None:
        found.append((self.name, [each.data_ptr() for each in arguments if isinstance(each, Tensor)]))

    monkeypatch.setattr(Kernel, "launch", note)
    yield found


class Only(TorchDispatchMode):
    """Raises at an op of torch that is not allowed, and counts the others."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.counts = Counter(dict.fromkeys(names, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name in self.counts, f"{func} in a step"
        self.counts[name] += 1
        return func(*args, **(kwargs or {}))


ALLOCATIONS = ("empty", "new_empty")
VIEWS = (
    "view",
    "select",
    "split",
    "split_with_sizes",
    "slice",
    "as_strided",
    "unbind",
    "t",
    "alias",
    "detach",
    "promote_types",
)
PRODUCTS = ("mm", "addmm_")


def implementations() -> dict[str, tuple[Callable[..., Any], tuple[str, ...]]]:
    from retinar.kernels.decode_step import gpu

    return {"triton": (gpu.decode_step, ()), "blas": (gpu.decode_step_blas, PRODUCTS)}


@pytest.mark.parametrize("backend", ["triton", "blas"])
def test_a_step_is_launches_and_products_alone(
    backend: str, worlds: dict[str, World], launches: list[tuple[str, list[int]]]
) -> None:
    """Around them torch allocates and views, and does nothing: no copy, no look at what a tensor holds, no wait."""
    run, products = implementations()[backend]
    step = worlds["fp32"].step([0, 3, 5, 2], 64)
    with Only(*ALLOCATIONS, *VIEWS, *products):
        run(*step.flat())
    read = dict(launches)
    assert {each.data_ptr() for each in step.inputs[:2]} <= set(read["decode_step_begin"])  # the buffers themselves
    assert {each.data_ptr() for each in step.inputs[3:]} <= set(read["cfg_sample"])
    attention = {step.inputs.positions_B, step.inputs.block_table_BM, step.weights.rope_NC2}
    assert {each.data_ptr() for each in attention} <= set(read["paged_attention_heads"])


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("backend", ["triton", "blas"])
def test_a_step_needs_no_numbers(
    backend: str, where: str, worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be made of tensors that hold none: whatever asked for one would raise."""
    run, _ = implementations()[backend]
    monkeypatch.setattr(Kernel, "launch", lambda *_: None)
    step = worlds["fp16"].step([0, 3, 5, 2], 64)
    if where == "meta":
        codes_I, logits_BV = run(*to_device(list(step.flat()), "meta"))
    else:
        from retinar.kernels import launch

        monkeypatch.setattr(Tensor, "data_ptr", lambda self: 0)
        assert launch.aligned(step.inputs.tokens_B) is step.inputs.tokens_B
        with FakeTensorMode() as mode:
            codes_I, logits_BV = run(*change(list(step.flat()), mode.from_tensor))
    assert codes_I.shape == (4,) and codes_I.dtype == torch.int64
    assert logits_BV.shape == (7, 96) and logits_BV.dtype == torch.float32


def gpt_xl(dtype: torch.dtype) -> Step:
    """The paper's model with two images, in tensors without numbers."""
    one = {"heads": 20, "groups": 20, "dim": 64, "layers": 1, "hidden": 3584, "vocabulary": 16384}
    with torch.device("meta"):
        shapes = {"wqkv": (3840, 1280), "wo": (1280, 1280), "w13": (7168, 1280), "w2": (1280, 3584)}
        lists = {name: [torch.empty(shape).to(dtype)] * 36 for name, shape in shapes.items()}
        norms = [torch.empty(1280).to(dtype)] * 36
        table = torch.empty(one["vocabulary"], 1280).to(dtype)
        weights = DecodeWeights(
            cls_embedding_CD=table[:3],
            tok_embedding_VD=table,
            **lists,
            attention_norm=norms,
            ffn_norm=norms,
            norm_D=norms[0],
            output_VD=table,
            n_head=20,
            n_kv_head=20,
            eps=1e-5,
            rope_NC2=torch.empty(1025, 32, 2),
        )
        caches = [torch.empty(36, 256, 16, 20, 64).to(dtype) for _ in range(2)]
        longs, ints, floats = torch.empty(2).long(), torch.empty(2).int(), torch.empty(2)
        rows = torch.empty(4).long(), torch.empty(4).int(), torch.empty(4, 64).int()
        inputs = StepInputs(*rows, ints, ints, floats, floats, ints, floats, longs, longs)
    return Step(weights, caches, inputs, [])


@pytest.mark.parametrize(
    ("backend", "dtype", "ours", "torchs"),
    [
        ("triton", torch.bfloat16, 36 * 6 + 3, 0),
        ("triton", torch.float16, 36 * 8 + 4, 0),
        ("blas", torch.bfloat16, 36 * 5 + 3, 36 * 4 + 2),
    ],
)
def test_launches_of_gpt_xl(
    backend: str, dtype: torch.dtype, ours: int, torchs: int, launches: list[tuple[str, list[int]]]
) -> None:
    """As README.md counts them."""
    run, products = implementations()[backend]
    arguments = gpt_xl(dtype).flat()
    with Only(*ALLOCATIONS, *VIEWS, *products, "_to_copy") as seen:
        run(*arguments)
    assert len(launches) == ours
    assert sum(seen.counts[name] for name in (*products, "_to_copy")) == torchs


def wrong() -> dict[str, tuple[Callable[[Step], None], str]]:
    def weights(**changed: Any) -> Callable[[Step], None]:
        return lambda step: setattr(step, "weights", step.weights._replace(**changed))

    def inputs(**changed: Any) -> Callable[[Step], None]:
        return lambda step: setattr(step, "inputs", step.inputs._replace(**changed))

    wide = [torch.zeros(81, 40)] * 2
    return {
        "tokens": (inputs(tokens_B=torch.zeros(3).int()), r"int64 tokens \[rows >= 1\], found torch.int32 \(3,\)"),
        "no rows": (inputs(tokens_B=torch.zeros(0).long()), r"int64 tokens \[rows >= 1\], found torch.int64 \(0,\)"),
        "seeds": (inputs(seed_I=torch.zeros(2).int()), r"seed_I as torch.int64 \[2\].* found torch.int32 \(2,\)"),
        "images": (inputs(top_p_I=torch.zeros(1)), r"top_p_I as torch.float32 \[2\], as cond_row_I says, found"),
        "doubles": (inputs(cfg_scale_I=torch.zeros(2).double()), r"cfg_scale_I as torch.float32 .*found torch.float64"),
        "ffn": (weights(w13=wide), r"w13 as \[80, 40\] in one floating dtype, .*found \['torch.float32 \[81, 40\]'\]"),
        "norm": (weights(norm_D=torch.ones(40).half()), r"norm_D as \[40\] .*output_VD's torch.float32, found .*16"),
        "layers": (weights(w13=wide[:0]), "one weight a layer in every list, found .*'w13': 0"),
        "gradients": (weights(output_VD=torch.zeros(96, 40).requires_grad_()), "has no gradient"),
        "groups": (weights(n_kv_head=0), "for 2 heads and 0 kv heads"),
    }


@pytest.mark.parametrize("what", wrong())
def test_what_does_not_fit_is_refused_in_words(what: str, worlds: dict[str, World]) -> None:
    spoil, sentence = wrong()[what]
    step = worlds["fp32"].step([1, 2], 16)
    spoil(step)
    with pytest.raises(ValueError, match=f"decode_step.*{sentence}"):
        step.run("reference")


@pytest.mark.parametrize("backend", ["triton", "blas"])
def test_what_the_kernels_do_not_take_is_refused_in_words(backend: str, worlds: dict[str, World]) -> None:
    def case(dim: int, dtype: torch.dtype = torch.float32, page: int = 4) -> Step:
        made = {"layers": 2, "heads": 1, "groups": 1, "dim": dim, "hidden": 8, "vocabulary": 8}
        weights = make_weights(made, dtype, torch.Generator().manual_seed(0))
        caches = [torch.zeros(2, 3, page, 1, dim, dtype=dtype) for _ in range(2)]
        row, images = torch.zeros(1, dtype=torch.int32), torch.zeros(0)
        inputs = StepInputs(row.long(), row, row[:, None], *(images.to(x.dtype) for x in like))
        return Step(weights, caches, inputs, [])

    like = worlds["fp32"].step([1], 16).inputs[3:]
    refused = f"decode_step: backend '{backend}' cannot run this call: "
    for step, reason in (
        (case(132), "it takes head dims that are multiples of 4 up to 128, found 132"),
        (case(8, torch.bfloat16), "it takes float32, float16 under the interpreter, found torch.bfloat16"),
        (case(8, torch.float64), "it takes float32, float16 under the interpreter, found torch.float64"),
        (case(4, torch.float16, page=1), "it takes caches that start at a multiple of 16 bytes"),  # the second layer's
    ):
        if step.weights.output_VD.dtype == torch.float64:
            floats = {name: each.double() for name, each in step.inputs._asdict().items() if each.is_floating_point()}
            step.inputs = step.inputs._replace(**floats)
        with pytest.raises(ValueError, match=refused + reason):
            step.run(backend)
        step.run(None)  # the reference takes it
