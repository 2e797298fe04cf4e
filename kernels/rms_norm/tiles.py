"""How the rms_norm kernels cut up rows, and which variants that makes: plain data, chosen by width and dtype alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from retinar.kernels.launch import TYPES, Variant
from retinar.kernels.rows import vector, whole_vectors


class Tile(NamedTuple):
    """How a kernel holds rows: warps to a row, vectors to a thread, warps of a program.

    ``resident``: programs of the backward to a multiprocessor, without and with ADD: as many as its registers hold.
    """

    row_warps: int
    chunks: int
    warps: int = 4
    resident: tuple[int, int] = (4, 4)

    def width(self, dtype: torch.dtype) -> int:
        """Elements of the longest row."""
        return self.row_warps * 32 * self.chunks * vector(dtype)


class Tiles(NamedTuple):
    """The tiles of a kernel by dtype, narrow ones first, and what its variants have beside them."""

    by_dtype: Mapping[torch.dtype, tuple[Tile, ...]]
    pointers: tuple[str, ...] = ()
    constants: tuple[tuple[str, int], ...] = ()

    def variant(self, dtype: torch.dtype, tile: Tile, add: bool, architecture: int) -> Variant:
        constants = (
            ("ADD", add),
            ("VEC", vector(dtype)),
            ("CHUNKS", tile.chunks),
            ("PADDED", 1 << (tile.chunks - 1).bit_length()),
            ("SPAN", tile.row_warps * 32 * vector(dtype)),
            ("ROWS", tile.warps // tile.row_warps),
        )
        pointers = (TYPES[dtype],) * 5 + self.pointers
        return Variant(architecture, pointers, constants + self.constants, tile.warps)

    def table(self, architecture: int) -> Iterator[Variant]:
        for dtype, tiles in self.by_dtype.items():
            yield from (self.variant(dtype, tile, add, architecture) for tile in tiles for add in (False, True))

    def choose(self, width: int, dtype: torch.dtype) -> Tile | None:
        """The tile for rows of a width; None for those of long_rows.py. Strides have no say: they change no bit."""
        fits = (each for each in self.by_dtype[dtype] if width <= each.width(dtype))
        return next(fits, None) if whole_vectors(width, dtype=dtype) else None


# Backward, a thread also holds its share of the weight's gradient, so it takes less of a row. fp16, which nothing
# trains in, makes do with fewer tiles.
FORWARD_TILES = Tiles(
    {
        torch.bfloat16: (Tile(1, 5), Tile(1, 8), Tile(2, 8), Tile(4, 8)),  # widths to 1280, 2048, 4096, 8192
        torch.float16: (Tile(1, 8), Tile(4, 8)),  # 2048, 8192
        torch.float32: (Tile(2, 5), Tile(2, 8), Tile(4, 8)),  # 1280, 2048, 4096
    }
)
BACKWARD_TILES = Tiles(
    {
        torch.bfloat16: (  # 1024, 1536, 2048, 3072, 4096
            Tile(2, 2),
            Tile(2, 3, resident=(3, 2)),
            Tile(4, 2),
            Tile(4, 3, resident=(3, 3)),
            Tile(8, 2, 8, resident=(2, 2)),
        ),
        torch.float16: (Tile(8, 2, 8, resident=(2, 2)),),  # 4096
        torch.float32: (  # 1536, 2048, 4096
            Tile(4, 3, resident=(4, 3)),
            Tile(4, 4, resident=(4, 3)),
            Tile(8, 4, 8, resident=(2, 2)),
        ),
    },
    pointers=("fp32",),
    constants=(("STAGES", 3),),
)
