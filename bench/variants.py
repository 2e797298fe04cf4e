"""What is checked and timed: every op's spec, and attention once more with dropout."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from retinar.kernels import ops
from retinar.kernels.spec import ALL_SPECS, OpSpec

SUFFIX = "_dropout"


def op_of(spec: OpSpec) -> str:
    """The op behind a spec, as ``ops.backends`` knows it."""
    return spec.name.removesuffix(SUFFIX)


def dropout_mask(batch: int, heads: int, positions: int, dropout_p: float, seed: Tensor) -> Tensor:
    """fp64 [B, H, N, N] of the reference's mask at and below the diagonal: 0 where dropped, its factor where kept.

    Read off the op itself, so that its definition is in one place: with q and k zero every probability of query i is
    1 / (i + 1), and with the identity for v the output is the dropped probabilities.
    """
    width = max(4, -(-positions // 4) * 4)
    zeros = torch.zeros(batch, heads, positions, width, dtype=torch.float64)
    identity = torch.eye(positions, width, dtype=torch.float64).expand(batch, heads, -1, -1)
    rope = torch.zeros(positions, width // 2, 2)
    dropped = ops.rope_attention(
        zeros, zeros, identity, rope, dropout_p=dropout_p, seed=seed.cpu(), backend="reference"
    )
    return dropped[..., :positions] * torch.arange(1, positions + 1)[:, None]


_ATTENTION = next(spec for spec in ALL_SPECS if spec.name == "rope_attention")
ATTENTION_DROPOUT = dataclasses.replace(
    _ATTENTION,
    name=f"rope_attention{SUFFIX}",
    cases=tuple({**case, "dropout": 10} for case in _ATTENTION.cases),  # percent
)
BENCHED: tuple[OpSpec, ...] = (*ALL_SPECS, ATTENTION_DROPOUT)
