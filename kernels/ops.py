"""The facade: everything public about the kernels. Other rooms import this module and, to count bytes, ``spec``."""

from __future__ import annotations

from retinar.kernels.cfg_sample import cfg_mix, cfg_sample, filter_logits
from retinar.kernels.decode_step import DecodeWeights, NativeDecoder, StepInputs, decode_step, huge_pages
from retinar.kernels.dispatch import backends, preferred
from retinar.kernels.linear import linear
from retinar.kernels.linear_cross_entropy import linear_cross_entropy
from retinar.kernels.native import native_info
from retinar.kernels.paged_attention import paged_attention
from retinar.kernels.philox import DOMAIN_ATTENTION, DOMAIN_SAMPLE, gumbel_noise, philox4x32
from retinar.kernels.rms_norm import add_rms_norm, rms_norm
from retinar.kernels.rope_attention import apply_rope, rope_attention, rope_table
from retinar.kernels.swiglu import swiglu
from retinar.kernels.vq_lookup import vq_lookup

__all__ = [
    "DOMAIN_ATTENTION",
    "DOMAIN_SAMPLE",
    "DecodeWeights",
    "NativeDecoder",
    "StepInputs",
    "add_rms_norm",
    "apply_rope",
    "backends",
    "cfg_mix",
    "cfg_sample",
    "decode_step",
    "filter_logits",
    "gumbel_noise",
    "huge_pages",
    "linear",
    "linear_cross_entropy",
    "native_info",
    "paged_attention",
    "philox4x32",
    "preferred",
    "rms_norm",
    "rope_attention",
    "rope_table",
    "swiglu",
    "vq_lookup",
]
