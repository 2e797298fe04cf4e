"""Triton kernels of guidance, filters and the draw: one program an image, which finds the bounds of what is kept and
then walks its codes once."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinar.kernels.cfg_sample.bounds import OUTSIDE, bounds, filtered, guided, key_of
from retinar.kernels.cfg_sample.reference import MINIMUM_TEMPERATURE
from retinar.kernels.launch import Kernel, Variant, aligned
from retinar.kernels.philox.noise import gumbel
from retinar.kernels.philox.reference import DOMAIN_SAMPLE
from retinar.kernels.rows import as_rows, vector, whole_vectors

COLDEST = tl.constexpr(MINIMUM_TEMPERATURE)
DOMAIN = tl.constexpr(DOMAIN_SAMPLE)
#: Above every code.
NONE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["vocabulary", "stride"])
def _filter_logits(
    logits, temperature, top_k, top_p, out, vocabulary: tl.int64, stride: tl.int64,
    VEC: tl.constexpr, LOOP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """One program: the row of an image. Vocabulary and stride come in units of VEC elements."""
    image = tl.program_id(0).to(tl.int64)
    vocabulary = vocabulary.to(tl.int32) * VEC
    logits += image * (stride * VEC)
    row = (logits, logits, False, 1.0, tl.maximum(tl.load(temperature + image), COLDEST))
    key, end = bounds(row, tl.load(top_k + image), tl.load(top_p + image), vocabulary, LOOP, BLOCK)
    out += image * vocabulary
    for start in range(0, vocabulary, STEP):
        code = start + tl.arange(0, STEP)
        tl.store(out + code, filtered(row, code, key, end, vocabulary), mask=code < vocabulary)


@triton.jit(do_not_specialize=["vocabulary", "stride"])
def _cfg_sample(
    logits, cond_row, null_row, cfg_scale, temperature, top_k, top_p, seed, index, position, out,
    vocabulary: tl.int64, stride: tl.int64,
    VEC: tl.constexpr, LOOP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """One program: the code of an image. Every place of the tile keeps its own best code until the end."""
    image = tl.program_id(0).to(tl.int64)
    vocabulary = vocabulary.to(tl.int32) * VEC
    cond = tl.load(cond_row + image).to(tl.int64)
    null = tl.load(null_row + image).to(tl.int64)
    row = (
        logits + cond * (stride * VEC),
        logits + tl.maximum(null, 0) * (stride * VEC),
        null >= 0,
        tl.load(cfg_scale + image),
        tl.maximum(tl.load(temperature + image), COLDEST),
    )
    key, end = bounds(row, tl.load(top_k + image), tl.load(top_p + image), vocabulary, LOOP, BLOCK)
    seed, index, position = tl.load(seed + image), tl.load(index + image), tl.load(position + image)
    best = tl.full([STEP], OUTSIDE, tl.int32)
    winner = tl.zeros([STEP], tl.int32)
    for start in range(0, vocabulary, STEP):
        code = start + tl.arange(0, STEP)
        x = filtered(row, code, key, end, vocabulary) + gumbel(start, position, index, seed, DOMAIN, STEP)
        keys = tl.where(code < vocabulary, key_of(x), OUTSIDE)
        better = keys > best  # strictly: of equal ones the lowest code stays
        best = tl.where(better, keys, best)
        winner = tl.where(better, code, winner)
    code = tl.min(tl.where(best == tl.max(best, 0), winner, NONE), 0)
    tl.store(out + image, code.to(tl.int64))


@triton.jit(do_not_specialize=["vocabulary", "scale_row", "scale_code"])
def _cfg_mix(
    cond, null, scale, out, vocabulary: tl.int64, scale_row: tl.int64, scale_code: tl.int64,
    VEC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: a block of a row. The vocabulary comes in units of VEC."""
    blocks = tl.cdiv(vocabulary, BLOCK // VEC).to(tl.int32)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    inside = tl.arange(0, BLOCK) < tl.minimum(vocabulary - block * (BLOCK // VEC), BLOCK // VEC).to(tl.int32) * VEC
    place = row * (vocabulary * VEC) + block * BLOCK + tl.arange(0, BLOCK)
    c = tl.load(cond + place, mask=inside)
    u = tl.load(null + place, mask=inside)
    s = tl.load(scale + row * scale_row + (block * BLOCK + tl.arange(0, BLOCK)) * scale_code, mask=inside)
    tl.store(out + place, guided(c, u, s), mask=inside)


@dataclass(frozen=True)
class Tile:
    """``block``: codes that are held in registers during a search; ``step``: codes of a step of the walk after it."""

    block: int
    step: int
    num_warps: int
    loop: bool = False


#: A thread holds 8 to 32 logits and as many masses; a row above the last but one is read again in every search step.
TILES = (Tile(1024, 1024, 4), Tile(4096, 2048, 8), Tile(16384, 4096, 16), Tile(8192, 4096, 16, loop=True))
MIX_BLOCK, MIX_WARPS = 1024, 8


def tile_of(vocabulary: int) -> Tile:
    """The narrowest that holds a row."""
    return next(tile for tile in TILES if tile.loop or vocabulary <= tile.block)


def _constants(tile: Tile, vectors: bool) -> dict[str, int | bool]:
    vec = vector(torch.float32) if vectors else 1
    return {"VEC": vec, "LOOP": tile.loop, "BLOCK": tile.block, "STEP": tile.step}


FILTER_POINTERS = ("fp32", "fp32", "i32", "fp32", "fp32")
SAMPLE_POINTERS = ("fp32", "i32", "i32", "fp32", "fp32", "i32", "fp32", "i64", "i64", "i32", "i64")


def _filter_table(arch: int) -> Iterator[Variant]:
    return (
        Variant(arch, FILTER_POINTERS, tuple(_constants(tile, vectors).items()), tile.num_warps)
        for tile in TILES
        for vectors in (False, True)
    )


def _sample_table(arch: int) -> Iterator[Variant]:
    return (
        Variant(arch, SAMPLE_POINTERS, each.constants, each.num_warps)
        for each in _filter_table(arch)
    )  # fmt: skip


def _mix_constants(vectors: bool) -> dict[str, int]:
    return {"VEC": vector(torch.float32) if vectors else 1, "BLOCK": MIX_BLOCK}


def _mix_table(arch: int) -> Iterator[Variant]:
    return (Variant(arch, ("fp32",) * 4, tuple(_mix_constants(v).items()), MIX_WARPS) for v in (False, True))


FILTER = Kernel("cfg_sample", _filter_logits, _filter_table)
SAMPLE = Kernel("cfg_sample", _cfg_sample, _sample_table)
MIX = Kernel("cfg_sample", _cfg_mix, _mix_table)
KERNELS = (MIX, FILTER, SAMPLE)


def cfg_mix(cond: Tensor, null: Tensor, scale: Tensor) -> Tensor:
    """Guided logits of contiguous conditional and null ones; the scale broadcasts to them."""
    out = cond.new_empty(cond.shape)
    if out.numel():
        vocabulary = cond.shape[-1] if cond.dim() else 1
        scale = aligned(scale.broadcast_to(cond.shape).reshape(-1, vocabulary))
        constants = _mix_constants(whole_vectors(vocabulary, dtype=cond.dtype))
        width = vocabulary // constants["VEC"]
        grid = (scale.shape[0] * triton.cdiv(vocabulary, MIX_BLOCK),)
        MIX.launch(grid, (aligned(cond), aligned(null), scale, out, width, *scale.stride()), constants, MIX_WARPS)
    return out


def filter_logits(logits_IV: Tensor, *parameters_I: Tensor) -> Tensor:
    """Filtered logits [I, V], contiguous. The parameters: temperature, top-k, top-p."""
    out_IV = logits_IV.new_empty(logits_IV.shape)
    if out_IV.numel():
        _launch(FILTER, logits_IV, parameters_I, out_IV)
    return out_IV


def cfg_sample(logits_BV: Tensor, *parameters_I: Tensor) -> Tensor:
    """Codes int64 [I]. The parameters: rows, scale, temperature, top-k, top-p, seed, index and position."""
    out_I = logits_BV.new_empty(parameters_I[0].shape, dtype=torch.int64)
    if out_I.numel():
        _launch(SAMPLE, logits_BV, parameters_I, out_I)
    return out_I


def _launch(kernel: Kernel, logits: Tensor, parameters_I: tuple[Tensor, ...], out: Tensor) -> None:
    """One program an image; nothing is read on the host but shapes and strides."""
    logits = as_rows(logits)
    vocabulary, stride = logits.shape[1], logits.stride(0)
    tile = tile_of(vocabulary)
    constants = _constants(tile, whole_vectors(vocabulary, stride, dtype=logits.dtype))
    vec = constants["VEC"]
    tensors = logits, *(aligned(each.contiguous()) for each in parameters_I), out
    kernel.launch((out.shape[0],), (*tensors, vocabulary // vec, stride // vec), constants, tile.num_warps)
