"""The sizes that are timed: the paper's GPT-XL (20 heads of 64, hidden 3584, 16,384 codes), scaled to the device.

Bytes and FLOPs of each come from the op's spec; here are only the numbers that are put in.
"""

from __future__ import annotations

from collections.abc import Mapping

from retinar.kernels.spec import Case

HEADS = {"heads": 20, "groups": 20, "dim": 64}
STEP = {**HEADS, "layers": 2, "hidden": 3584, "vocabulary": 16384, "page": 16}

CPU: Mapping[str, Case] = {
    "rms_norm": {"rows": 1024, "width": 1280},
    "add_rms_norm": {"rows": 1024, "width": 1280},
    "swiglu": {"rows": 512, "width": 3584},
    "swiglu_packed": {"rows": 512, "width": 3584},
    "rope_attention": {**HEADS, "batch": 1, "positions": 512},
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
    "rope_attention": {**HEADS, "batch": 8, "positions": 1024},
    "paged_attention": {**HEADS, "batch": 32, "page": 16, "position": 1023},
    "cfg_mix": {"images": 64, "vocabulary": 16384},
    "filter_logits": {"images": 64, "vocabulary": 16384},
    "cfg_sample": {"images": 64, "vocabulary": 16384},
    "linear_cross_entropy": {"tokens": 8192, "width": 1280, "vocabulary": 16384},
    "linear": {"rows": 64, "inner": 1280, "outer": 3840},
    "decode_step": {**STEP, "images": 32},
    "vq_lookup": {"vectors": 32768, "codes": 16384, "channels": 8},
}
SIZES: Mapping[str, Mapping[str, Case]] = {"cpu": CPU, "cuda": CUDA}
DTYPES: Mapping[str, str] = {"cpu": "float32", "cuda": "bfloat16"}
"""The dtype that is timed on a device, where the op's spec has it; else fp32."""
