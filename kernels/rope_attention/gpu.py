"""Launchers of rope_attention's Triton kernels (`forward.py`, `backward.py`), and the tables of what they launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from retinar.kernels.launch import FLOATS, TYPES, Kernel, Variant, aligned, architecture
from retinar.kernels.rope_attention.backward import (
    _rope_attention_backward_kv,
    _rope_attention_backward_q,
    _rope_attention_backward_row_sums,
)
from retinar.kernels.rope_attention.forward import _rope_attention_forward
from retinar.kernels.rope_attention.reference import dropout_threshold, split_packed
from retinar.kernels.rope_attention.tiles import _rope_attention_turn


class Tile(NamedTuple):
    """Block of queries, block of keys, warps, pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Shape(NamedTuple):
    """What the kernels are specialised to: the padded half of the head dim, and whether padding is none."""

    half: int
    exact: bool

    @property
    def vector(self) -> int:
        """Elements that strides are multiples of: 16 bytes where the head dim allows it, else 4 elements (100, 20)."""
        return 8 if self.exact else 4


SHAPES = (Shape(16, True), Shape(32, True), Shape(64, True), Shape(64, False))
MOST_ROWS = 128  # of any tile; scratch memory of the backward is a multiple of it
PASS_ROWS, PASS_WARPS = 32, 4  # of the kernels that go once over memory


def shape_of(head_dim: int) -> Shape:
    """Head dims 32, 64 and 128 as they are; the others, 100 among them, padded to 128."""
    exact = Shape(head_dim // 2, True)
    return exact if exact in SHAPES else SHAPES[-1]


# A tile is cut where its registers end: none of these spills one, and on 9.0 none makes the assembler serialise the
# matrix products. Of two that pass, the one with more warps to a multiprocessor is taken. On 8.x, operands of the
# tensor cores go through registers and tiles are smaller; fp32 is multiplied without tensor cores.


def forward_tile(arch: int, dtype: torch.dtype, shape: Shape, dropout: bool, turned: bool) -> Tile:
    """Tile of the forward kernel."""
    if dtype == torch.float32:
        return Tile(16 if shape.half == 64 else 32, 16, 4, 1)
    if shape.half == 64:
        return Tile(128, 64, 8, 2) if arch == 90 else Tile(64, 32, 4, 2)
    return Tile(64, 64, 4, 3) if arch == 90 and turned else Tile(128, 64, 8, 3)


def backward_kv_tile(arch: int, dtype: torch.dtype, shape: Shape, dropout: bool, turned: bool) -> Tile:
    """Tile of the kernel for the gradients of keys and values."""
    if dtype == torch.float32:
        if shape.half == 64:
            return Tile(16, 16, 8, 2 if dropout else 1)
        return Tile(16, 16 if shape.half == 16 else 32, 4, 1)
    if shape.half == 64:
        return Tile(32, 64, 8, 2) if arch == 90 and (dropout or not shape.exact) else Tile(64, 64, 8, 2)
    if dropout and not turned:
        return Tile(32, 128, 8, 2) if arch == 90 or shape.half == 16 else Tile(32, 32, 4, 1)
    return Tile(64 if arch == 90 else 32, 128, 8, 2)


def backward_q_tile(arch: int, dtype: torch.dtype, shape: Shape, dropout: bool, turned: bool) -> Tile:
    """Tile of the kernel for the gradient of the queries."""
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1) if shape.half == 64 else Tile(32, 16, 4, 1)
    if arch == 90 and shape.half < 64:
        return Tile(64, 64, 4, 3 if turned and not dropout else 2)
    if arch == 80 and shape.half == 64 and dropout:
        return Tile(64, 32, 8, 2)
    return Tile(128, 32, 8, 1 if arch == 90 and dropout else 2)


Choose = Callable[[int, torch.dtype, Shape, bool, bool], Tile]


def turn_first(positions: int, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether q or k, where a kernel reads it once for each block of the other, is rotated beforehand by `TURN`.

    Inside, the rotation of a tile costs its share of the vector units and 4 bytes of cos and sin for each of its 2-byte
    elements, every time it is read; beforehand, it costs one pass over memory. Half the blocks of a causal sequence
    read a tile: from about four blocks on, the pass is cheaper. (Counted, not measured.) Head dims above 64 leave no
    registers for a rotation inside; at the others fp32, which is there for checks, has no second way.
    """
    return shape.half == 64 or (positions > 256 and dtype != torch.float32)


def constants(shape: Shape, dropout: bool, turned: bool, tile: Tile) -> dict[str, int | bool]:
    """Constants of the three kernels with scores, in the order of their arguments."""
    return _of_shape(shape) | {"DROPOUT": dropout, "ROWS": tile.rows, "COLUMNS": tile.columns, "TURNED": turned}


def _of_shape(shape: Shape) -> dict[str, int | bool]:
    return {"VEC": shape.vector, "HALF": shape.half, "EXACT": shape.exact}


def _types(pointers: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Pointer types from a letter each: x the inputs' dtype, f fp32, s the int64 seed."""
    return tuple({"x": TYPES[dtype], "f": "fp32", "s": "i64"}[letter] for letter in pointers)


def _table(choose: Choose, pointers: str) -> Callable[[int], Iterator[Variant]]:
    def table(arch: int) -> Iterator[Variant]:
        for dtype in FLOATS:
            types = _types(pointers, dtype)
            for shape in SHAPES:
                ways = {turn_first(positions, dtype, shape) for positions in (1, 1 << 20)}
                for dropout, turned in itertools.product((False, True), ways):
                    tile = choose(arch, dtype, shape, dropout, turned)
                    chosen = tuple(constants(shape, dropout, turned, tile).items())
                    yield Variant(arch, types, chosen, tile.num_warps, tile.num_stages)

    return table


def _pass_constants(shape: Shape) -> dict[str, int | bool]:
    return _of_shape(shape) | {"ROWS": PASS_ROWS}


def _pass_table(pointers: str) -> Callable[[int], Iterator[Variant]]:
    def table(arch: int) -> Iterator[Variant]:
        for dtype in FLOATS:
            for shape in SHAPES:
                yield Variant(arch, _types(pointers, dtype), tuple(_pass_constants(shape).items()), PASS_WARPS)

    return table


FORWARD = Kernel("rope_attention", _rope_attention_forward, _table(forward_tile, "xxxfsxf"))
TURN = Kernel("rope_attention", _rope_attention_turn, _pass_table("xfx"))
BACKWARD_ROW_SUMS = Kernel("rope_attention", _rope_attention_backward_row_sums, _pass_table("xxfff"))
BACKWARD_KV = Kernel("rope_attention", _rope_attention_backward_kv, _table(backward_kv_tile, "xxxxfsffxx"))
BACKWARD_Q = Kernel("rope_attention", _rope_attention_backward_q, _table(backward_q_tile, "xxxxfsffx"))
KERNELS = (TURN, FORWARD, BACKWARD_ROW_SUMS, BACKWARD_KV, BACKWARD_Q)


def rope_attention(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, rope_NC2: Tensor, dropout_p: float, seed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] over [B, N, H, D] memory, and the log-sum-exp of the scores, fp32 [B, H, N]."""
    batch, heads, positions, head_dim = q_BHND.shape
    o_BHND = q_BHND.new_empty(batch, positions, heads, head_dim).transpose(1, 2)
    lse_BHN = q_BHND.new_empty(batch, heads, positions, dtype=torch.float32)
    if q_BHND.numel() == 0:
        return o_BHND, lse_BHN
    shape, threshold = shape_of(head_dim), dropout_threshold(dropout_p)
    turned = turn_first(positions, q_BHND.dtype, shape)
    tile = forward_tile(architecture(q_BHND.device) or 0, q_BHND.dtype, shape, threshold > 0, turned)
    rope = aligned(rope_NC2.contiguous())
    q, k, v = (_readable(each, shape) for each in (q_BHND, k_BGND, v_BGND))
    if turned:
        k = _turn(k, rope, shape)
    dim = head_dim // shape.vector
    blocks = triton.cdiv(positions, tile.rows)
    numbers = positions, dim, heads, heads // k.shape[1], threshold, blocks, scale, 256 / (256 - threshold)
    FORWARD.launch(
        (blocks * batch * heads,),
        (q, k, v, rope, aligned(seed), o_BHND, lse_BHN, *_strides(shape, q, k, v, o_BHND), *numbers),
        constants(shape, threshold > 0, turned, tile),
        tile.num_warps,
        tile.num_stages,
    )
    return o_BHND, lse_BHN


def rope_attention_packed(qkv_BNTD: Tensor, heads: int, *settings: Any) -> tuple[Tensor, Tensor]:
    """The same on views of a packed projection [B, N, H + 2 G, D]."""
    return rope_attention(*split_packed(qkv_BNTD, heads), *settings)


def rope_attention_backward(
    grad_BHND: Tensor, q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, o_BHND: Tensor, lse_BHN: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; scores and mask are made again from the inputs, the log-sum-exp and the seed."""
    grads = q_BHND.new_empty(q_BHND.shape), k_BGND.new_empty(k_BGND.shape), v_BGND.new_empty(v_BGND.shape)
    _backward_into(grads, grad_BHND, q_BHND, k_BGND, v_BGND, o_BHND, lse_BHN, *settings)
    return grads


def rope_attention_packed_backward(
    grad_BHND: Tensor, qkv_BNTD: Tensor, heads: int, o_BHND: Tensor, lse_BHN: Tensor, *settings: Any
) -> Tensor:
    """Gradient of a packed projection, each kernel writing into its part."""
    grad_qkv_BNTD = qkv_BNTD.new_empty(qkv_BNTD.shape)
    parts = split_packed(qkv_BNTD, heads)
    _backward_into(split_packed(grad_qkv_BNTD, heads), grad_BHND, *parts, o_BHND, lse_BHN, *settings)
    return grad_qkv_BNTD


def _backward_into(
    grads: tuple[Tensor, ...],
    grad_BHND: Tensor,
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    o_BHND: Tensor,
    lse_BHN: Tensor,
    rope_NC2: Tensor,
    dropout_p: float,
    seed: Tensor,
    scale: float,
) -> None:
    batch, heads, positions, head_dim = q_BHND.shape
    groups = k_BGND.shape[1]
    if q_BHND.numel() == 0:
        return
    shape, threshold = shape_of(head_dim), dropout_threshold(dropout_p)
    rope, lse, seed = aligned(rope_NC2.contiguous()), aligned(lse_BHN.contiguous()), aligned(seed)
    grad, q, k, v, o = (_readable(each, shape) for each in (grad_BHND, q_BHND, k_BGND, v_BGND, o_BHND))
    padded, dim = triton.cdiv(positions, MOST_ROWS), head_dim // shape.vector
    lse2, sums = lse.new_empty(2, batch * heads, padded * MOST_ROWS)
    blocks = padded * MOST_ROWS // PASS_ROWS
    BACKWARD_ROW_SUMS.launch(
        (blocks * batch * heads,),
        (grad, o, lse, lse2, sums, *_strides(shape, grad, o), positions, padded, dim, heads, blocks),
        _pass_constants(shape),
        PASS_WARPS,
    )
    turned = turn_first(positions, q.dtype, shape)
    if turned:
        q, k = _turn(q, rope, shape), _turn(k, rope, shape)
    # Each query head makes its own gradients; those that share a key-value head are summed at the end. A part of a
    # packed gradient may start where no 16-byte access can.
    made = tuple(
        part if part.shape == q_BHND.shape and part.data_ptr() % 16 == 0 else q_BHND.new_empty(q_BHND.shape)
        for part in grads
    )
    for kernel, choose, axis, written in (
        (BACKWARD_KV, backward_kv_tile, "columns", made[1:]),
        (BACKWARD_Q, backward_q_tile, "rows", made[:1]),
    ):
        tile = choose(architecture(q.device) or 0, q.dtype, shape, threshold > 0, turned)
        blocks = triton.cdiv(positions, getattr(tile, axis))
        numbers = positions, padded, dim, heads, heads // groups, threshold, blocks, scale, 256 / (256 - threshold)
        kernel.launch(
            (blocks * batch * heads,),
            (grad, q, k, v, rope, seed, lse2, sums, *written, *_strides(shape, q, k, v, grad, *written), *numbers),
            constants(shape, threshold > 0, turned, tile),
            tile.num_warps,
            tile.num_stages,
        )
    for part, found in zip(grads, made, strict=True):
        if found is not part:
            part.copy_(found if part.shape == found.shape else found.unflatten(1, (groups, -1)).sum(2))


def _turn(x: Tensor, rope: Tensor, shape: Shape) -> Tensor:
    """[B, H, N, D] rotated, as [B, H, N, even half | odd half] with the halves padded to the kernels' width."""
    batch, heads, positions, head_dim = x.shape
    out = x.new_empty(batch, heads, positions, 2 * shape.half)
    blocks = triton.cdiv(positions, PASS_ROWS)
    TURN.launch(
        (blocks * batch * heads,),
        (x, rope, out, *_strides(shape, x), positions, head_dim // shape.vector, heads, blocks),
        _pass_constants(shape),
        PASS_WARPS,
    )
    return out


def _strides(shape: Shape, *tensors: Tensor) -> tuple[int, ...]:
    """Batch, head and position strides, in vectors."""
    return tuple(each.stride(axis) // shape.vector for each in tensors for axis in range(3))


def _readable(x: Tensor, shape: Shape) -> Tensor:
    """The tensor, or a contiguous copy where its strides are not whole vectors."""
    fits = x.stride(3) == 1 and all(x.stride(axis) % shape.vector == 0 for axis in range(3))
    fits = fits and x.stride(2) * MOST_ROWS < 2**31  # offsets within a tile have 32 bits
    return aligned(x if fits else x.contiguous())
