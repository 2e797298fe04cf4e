"""The tensors of a step: explicit inputs at addresses that never change, rebuilt only when the set of rows changes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retinar.engine.config import GPTConfig
from retinar.engine.kv_cache import pages_for
from retinar.engine.scheduler import LiveImage
from retinar.kernels import ops

_FLOAT, _INT, _LONG = torch.float32, torch.int32, torch.int64
# What a row or an image behind the live ones says: class 0 at position 0 in the scratch page, drawn for nobody.
PADDING = {
    "tokens_B": (_LONG, 0),
    "positions_B": (_INT, 0),
    "cond_row_I": (_INT, 0),
    "null_row_I": (_INT, -1),
    "cfg_scale_I": (_FLOAT, 1.0),
    "temperature_I": (_FLOAT, 1.0),
    "top_k_I": (_INT, 0),
    "top_p_I": (_FLOAT, 1.0),
    "seed_I": (_LONG, 0),
    "index_I": (_LONG, 0),
}


def step_buffers(
    config: GPTConfig, page_size: int, scratch_page: int, max_images: int, device: torch.device
) -> ops.StepInputs:
    """Inputs with room for ``max_images`` pairs, all of it padding: rows that a step may run and nobody asks for.

    They all read the same token at position 0 of one page that no image owns, so they write equal bits into one slot.
    """
    width = pages_for(config.block_size, page_size)
    columns = {
        name: torch.full((2 * max_images if name.endswith("_B") else max_images,), value, dtype=dtype, device=device)
        for name, (dtype, value) in PADDING.items()
    }
    table_BM = torch.full((2 * max_images, width), scratch_page, dtype=_INT, device=device)
    return ops.StepInputs(block_table_BM=table_BM, **columns)


def front(inputs: ops.StepInputs, images: int, rows: int) -> ops.StepInputs:
    """The first rows and images of step inputs, as views."""
    return ops.StepInputs(
        *(each[:images] if name.endswith("_I") else each[:rows] for name, each in inputs._asdict().items())
    )


class StepBatch:
    """The live rows of a step, written into ``buffers`` (of `step_buffers`) from the front.

    Rows are the live images' conditional rows in order of admission, then the null rows of those still guided; what
    lies behind them is padding. Everything is rebuilt only when the set of rows changes (at most three times an image);
    in between a step costs an addition and a gather. ``codes_ST`` int64 [slots, block_size] holds what has been drawn;
    it stays on the device until an image is complete.
    """

    def __init__(self, config: GPTConfig, buffers: ops.StepInputs) -> None:
        self.vocab_size, self.buffers = config.vocab_size, buffers
        self.device = buffers.tokens_B.device
        max_images = buffers.cond_row_I.shape[0]
        self.scratch_page = int(buffers.block_table_BM[0, 0])
        self.codes_ST = torch.zeros(max_images, config.block_size, dtype=_LONG, device=self.device)
        self.inputs = front(buffers, 0, 0)
        self._slot_I = self._image_B = torch.zeros(0, dtype=_LONG, device=self.device)

    def rebuild(self, live: list[LiveImage], null_class: int) -> None:
        """Lay out the rows of ``live``; positions come from the scheduler, the last codes from ``codes_ST``."""
        guided = [i for i, image in enumerate(live) if image.guided]
        images, rows = len(live), len(live) + len(guided)
        image_of_row = list(range(images)) + guided
        null_rows = [-1] * images
        for row, i in enumerate(guided, start=images):
            null_rows[i] = row
        params = [image.request.params for image in live]
        columns: dict[str, list] = {
            "tokens_B": [image.request.label for image in live] + [null_class] * len(guided),
            "positions_B": [live[i].position for i in image_of_row],
            "cond_row_I": list(range(images)),
            "null_row_I": null_rows,
            "cfg_scale_I": [p.cfg_scale for p in params],
            "temperature_I": [p.temperature for p in params],
            "top_k_I": [p.top_k if p.top_k < self.vocab_size else 0 for p in params],
            "top_p_I": [p.top_p for p in params],
            "seed_I": [image.request.stream.seed_word for image in live],
            "index_I": [image.request.stream.index for image in live],
        }
        for name, values in columns.items():
            target = getattr(self.buffers, name)
            whole = torch.full(target.shape, PADDING[name][1], dtype=target.dtype)
            whole[: len(values)] = torch.tensor(values, dtype=target.dtype)
            self._send(whole, target)
        # entries of a table past a row's own pages name the scratch page, a valid address that is not read for it
        table_BM = np.full(self.buffers.block_table_BM.shape, self.scratch_page, np.int32)
        for row, i in enumerate(image_of_row):
            pages = live[i].cond_pages if row < images else live[i].null_pages
            table_BM[row, : len(pages)] = pages
        self._send(torch.from_numpy(table_BM), self.buffers.block_table_BM)
        self.inputs = front(self.buffers, images, rows)

        self._slot_I = self._sent(torch.tensor([image.slot for image in live], dtype=_LONG))
        self._image_B = self._sent(torch.tensor(image_of_row, dtype=_LONG))
        positions_B = self.inputs.positions_B.long()
        last_B = self.codes_ST[self._slot_I[self._image_B], (positions_B - 1).clamp_(min=0)]
        self.inputs.tokens_B.copy_(torch.where(positions_B == 0, self.inputs.tokens_B, last_B))

    def record(self, codes_I: Tensor) -> None:
        """Keep the step's codes and make them the next step's input, without a copy to the host."""
        positions_I = self.inputs.positions_B[: codes_I.shape[0]]
        self.codes_ST[self._slot_I, positions_I.long()] = codes_I
        torch.index_select(codes_I, 0, self._image_B, out=self.inputs.tokens_B)
        self.inputs.positions_B.add_(1)

    def take(self, slot: int) -> Tensor:
        """A copy of an image's codes, int64 [block_size], made in the stream's turn: the slot may be used again."""
        return self.codes_ST[slot].clone()

    def _send(self, host: Tensor, target: Tensor) -> None:
        """To the device, without waiting for it: out of pinned memory, which torch keeps until the copy is done."""
        pinned = host.pin_memory() if self.device.type == "cuda" else host
        target.copy_(pinned, non_blocking=True)

    def _sent(self, host: Tensor) -> Tensor:
        target = torch.empty_like(host, device=self.device)
        self._send(host, target)
        return target
