"""One decode step of attention over a paged cache: rotate, write the new key and value, attend over the row's slots.

A row is computed alone, on shapes that depend on its own length only, with products and ``torch.sum`` rather than
BLAS: the order of every sum is then fixed, whatever the batch, the page size and the number of threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retinar.kernels.numerics import wide
from retinar.kernels.rope_attention.rope import rotate

#: Slots copied together, at most: torch's index_select costs as much for a short row as for a few kilobytes.
RUN = 16


class Plan(NamedTuple):
    """Where the rows of a batch live in the cache; one plan serves all layers of a step."""

    new_slot_B: Tensor  # int64, index into [P * S]
    lengths: list[int]  # for each row its position + 1
    run: int  # slots in a run; divides the page size
    runs: list[Tensor]  # for each row its runs in order, int64 indices into [P * S / run]


def plan_rows(block_table_BM: Tensor, positions_B: Tensor, page_size: int) -> Plan:
    lengths = [position + 1 for position in positions_B.tolist()]
    run = math.gcd(page_size, RUN)
    runs_per_page = page_size // run
    place_N = torch.arange(-(-max(lengths, default=0) // run), device=block_table_BM.device)
    runs_BN = block_table_BM.long()[:, place_N // runs_per_page] * runs_per_page + place_N % runs_per_page
    runs = [runs_N[: -(-length // run)] for runs_N, length in zip(runs_BN, lengths, strict=True)]
    positions = positions_B.long()[:, None]
    new_slot_B = (runs_BN.gather(1, positions // run) * run + positions % run)[:, 0]
    return Plan(new_slot_B, lengths, run, runs)


def paged_attention(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    k_cache_PSGD: Tensor,
    v_cache_PSGD: Tensor,
    block_table_BM: Tensor,
    positions_B: Tensor,
    rope_NC2: Tensor,
    scale: float,
) -> Tensor:
    plan = plan_rows(block_table_BM, positions_B, k_cache_PSGD.shape[1])
    rope_BC2 = rope_NC2[positions_B.long()]
    return attend(q_BHD, k_BGD, v_BGD, k_cache_PSGD, v_cache_PSGD, plan, rope_BC2, scale)


def attend(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    k_cache_PSGD: Tensor,
    v_cache_PSGD: Tensor,
    plan: Plan,
    rope_BC2: Tensor,
    scale: float,
) -> Tensor:
    """The step for one layer, given the plan and the rows' own angles [B, D / 2, 2]."""
    q_BHD, k_BGD = rotate(q_BHD, rope_BC2[:, None]), rotate(k_BGD, rope_BC2[:, None])
    groups = k_BGD.shape[1]
    k_slots, v_slots = k_cache_PSGD.view(-1, *k_BGD.shape[1:]), v_cache_PSGD.view(-1, *v_BGD.shape[1:])
    k_slots[plan.new_slot_B] = k_BGD.to(k_slots.dtype)
    v_slots[plan.new_slot_B] = v_BGD.to(v_slots.dtype)
    out_BHD = q_BHD.new_empty(q_BHD.shape)
    out_BGRD = out_BHD.unflatten(1, (groups, -1))  # query head h reads key-value head h // R
    q_BGRD = q_BHD.to(wide(q_BHD.dtype)).unflatten(1, (groups, -1))
    # Scratch for the longest row, reused by all: fresh memory for every row would cost more than the arithmetic.
    k_runs, v_runs = k_slots.unflatten(0, (-1, plan.run)), v_slots.unflatten(0, (-1, plan.run))
    gathered = k_runs.new_empty(max(map(len, plan.runs), default=0), *k_runs.shape[1:])
    product_NGD = q_BGRD.new_empty(gathered.shape).flatten(0, 1)
    for q_GRD, out_GRD, runs_N, length in zip(q_BGRD, out_BGRD, plan.runs, plan.lengths, strict=True):
        row, product = gathered[: len(runs_N)], product_NGD[:length]
        row_NGD = row.flatten(0, 1)[:length]
        torch.index_select(k_runs, 0, runs_N, out=row)
        scores_RGN = [torch.mul(row_NGD, q_GD, out=product).sum(-1).t() for q_GD in q_GRD.unbind(1)]
        weights_RGN = (torch.stack(scores_RGN) * scale).softmax(-1)
        torch.index_select(v_runs, 0, runs_N, out=row)
        for repeat, weights_GN in enumerate(weights_RGN):
            out_GRD[:, repeat] = torch.mul(row_NGD, weights_GN.t().unsqueeze(-1), out=product).sum(0)
    return out_BHD
