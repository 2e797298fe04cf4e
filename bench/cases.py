"""The sizes that are timed: the paper's GPT-XL (20 heads of 64, hidden 3584, 16,384 codes), scaled to the device.

Bytes and FLOPs of each come from the op's spec; here are only the numbers that are put in, and what is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from retinar.kernels.spec import Case, OpSpec

Direction = Literal["forward", "backward", "both"]

HEADS = {"heads": 20, "groups": 20, "dim": 64}
STEP = {**HEADS, "layers": 2, "hidden": 3584, "vocabulary": 16384, "page": 16}
SMALL = {"heads": 2, "groups": 2, "dim": 32}

CPU: Mapping[str, Case] = {
    "rms_norm": {"rows": 1024, "width": 1280},
    "add_rms_norm": {"rows": 1024, "width": 1280},
    "swiglu": {"rows": 512, "width": 3584},
    "swiglu_packed": {"rows": 512, "width": 3584},
    "rope_attention": {**HEADS, "batch": 1, "positions": 512},
    "rope_attention_packed": {**HEADS, "batch": 1, "positions": 512},
    "rope_attention_dropout": {**HEADS, "batch": 1, "positions": 256, "dropout": 10},
    "paged_attention": {**HEADS, "batch": 4, "page": 16, "position": 1023},
    "cfg_mix": {"images": 8, "vocabulary": 16384},
    "filter_logits": {"images": 8, "vocabulary": 16384},
    "cfg_sample": {"images": 8, "vocabulary": 16384},
    "linear_cross_entropy": {"tokens": 128, "width": 1280, "vocabulary": 16384},
    "linear": {"rows": 16, "inner": 1280, "outer": 3840},
    "decode_step": {**STEP, "images": 4},
    "vq_lookup": {"vectors": 1024, "codes": 16384, "channels": 8},
}
CUDA: Mapping[str, Case] = {
    "rms_norm": {"rows": 32768, "width": 1280},
    "add_rms_norm": {"rows": 32768, "width": 1280},
    "swiglu": {"rows": 32768, "width": 3584},
    "swiglu_packed": {"rows": 32768, "width": 3584},
    "rope_attention": {**HEADS, "batch": 32, "positions": 1024},
    "rope_attention_packed": {**HEADS, "batch": 32, "positions": 1024},
    "rope_attention_dropout": {**HEADS, "batch": 32, "positions": 1024, "dropout": 10},
    "paged_attention": {**HEADS, "batch": 32, "page": 16, "position": 1023},
    "cfg_mix": {"images": 64, "vocabulary": 16384},
    "filter_logits": {"images": 64, "vocabulary": 16384},
    "cfg_sample": {"images": 64, "vocabulary": 16384},
    "linear_cross_entropy": {"tokens": 32768, "width": 1280, "vocabulary": 16384},
    "linear": {"rows": 64, "inner": 1280, "outer": 3840},
    "decode_step": {**STEP, "images": 32},
    "vq_lookup": {"vectors": 32768, "codes": 16384, "channels": 8},
}
EXERCISE: Mapping[str, Case] = {
    "rms_norm": {"rows": 8, "width": 256},
    "add_rms_norm": {"rows": 8, "width": 256},
    "swiglu": {"rows": 4, "width": 256},
    "swiglu_packed": {"rows": 4, "width": 256},
    "rope_attention": {**SMALL, "batch": 1, "positions": 64},
    "rope_attention_packed": {**SMALL, "batch": 1, "positions": 64},
    "rope_attention_dropout": {**SMALL, "batch": 1, "positions": 64, "dropout": 10},
    "paged_attention": {**SMALL, "batch": 2, "page": 16, "position": 20},
    "cfg_mix": {"images": 2, "vocabulary": 256},
    "filter_logits": {"images": 2, "vocabulary": 256},
    "cfg_sample": {"images": 2, "vocabulary": 256},
    "linear_cross_entropy": {"tokens": 64, "width": 32, "vocabulary": 512},
    "linear": {"rows": 4, "inner": 64, "outer": 128},
    "decode_step": {**SMALL, "layers": 1, "hidden": 64, "vocabulary": 64, "page": 4, "images": 2},
    "vq_lookup": {"vectors": 64, "codes": 256, "channels": 8},
}
SIZES: Mapping[str, Mapping[str, Case]] = {"cpu": CPU, "cuda": CUDA, "exercise": EXERCISE}
DTYPES: Mapping[str, str] = {"cpu": "float32", "cuda": "bfloat16", "exercise": "float32"}
"""The dtype that is timed, where the op's spec has it; else fp32."""

FIRST = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "swiglu_packed",
    "rope_attention",
    "rope_attention_packed",
    "rope_attention_dropout",
    "linear_cross_entropy",
)
"""Measured before the others, in case time runs out: a training step is made of them, and the targets are theirs."""

LEFT_OUT: Mapping[tuple[str, str, str], str] = {
    ("cuda", "rope_attention_dropout", "reference"): "its mask is made in int64 head by head, a second and more a call",
}
"""(size, spec, implementation) that is checked but not timed, and why."""


def directions(spec: OpSpec) -> tuple[Direction, ...]:
    """What is timed of an op.

    The loss does its backward's work in the forward when gradients are wanted, so its backward alone says nothing.
    """
    if not spec.gradients:
        return ("forward",)
    if spec.name == "linear_cross_entropy":
        return ("forward", "both")
    return ("forward", "backward", "both") if spec.name.startswith("rope_attention") else ("forward", "backward")
