"""The specs of all ops, one place for shapes, tolerances, bytes and FLOPs."""

from __future__ import annotations

from retinar.kernels.cfg_sample.spec import CFG_MIX, CFG_SAMPLE, FILTER_LOGITS
from retinar.kernels.decode_step.spec import DECODE_STEP
from retinar.kernels.linear.spec import LINEAR
from retinar.kernels.linear_cross_entropy.spec import LINEAR_CROSS_ENTROPY
from retinar.kernels.opspec import Case, ErrorBudget, Inputs, OpSpec
from retinar.kernels.paged_attention.spec import PAGED_ATTENTION
from retinar.kernels.rms_norm.spec import ADD_RMS_NORM, RMS_NORM
from retinar.kernels.rope_attention.spec import (
    ROPE_ATTENTION,
    ROPE_ATTENTION_PACKED,
    attention_parts,
    plain_attention,
)
from retinar.kernels.swiglu.spec import SWIGLU, SWIGLU_PACKED
from retinar.kernels.vq_lookup.spec import VQ_LOOKUP

__all__ = ["ALL_SPECS", "Case", "ErrorBudget", "Inputs", "OpSpec", "attention_parts", "plain_attention"]

ALL_SPECS: tuple[OpSpec, ...] = (
    RMS_NORM,
    ADD_RMS_NORM,
    SWIGLU,
    SWIGLU_PACKED,
    ROPE_ATTENTION,
    ROPE_ATTENTION_PACKED,
    PAGED_ATTENTION,
    CFG_MIX,
    FILTER_LOGITS,
    CFG_SAMPLE,
    LINEAR_CROSS_ENTROPY,
    LINEAR,
    DECODE_STEP,
    VQ_LOOKUP,
)
