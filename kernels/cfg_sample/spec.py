"""Specs of cfg_mix, filter_logits and cfg_sample."""

from __future__ import annotations

import torch
from torch import Tensor

from retinar.kernels.cfg_sample import cfg_mix, cfg_sample, filter_logits
from retinar.kernels.opspec import Case, Inputs, OpSpec, normal
from retinar.kernels.philox import gumbel_noise

CASES = (
    {"images": 1, "vocabulary": 1},
    {"images": 3, "vocabulary": 101},
    {"images": 8, "vocabulary": 1024},
    {"images": 2, "vocabulary": 16384},
)


def _parameters(images: int) -> Inputs:
    """Every combination of filters occurs among eight images; every third image is unguided."""
    image = torch.arange(images)
    unguided = image % 3 == 2
    return {
        "cond_row": image.int(),
        "null_row": torch.where(unguided, -1, image + images).int(),
        "cfg_scale": 1.0 + image.float() / 2,
        "temperature": torch.tensor([1.0, 0.7, 1.5])[image % 3],
        "top_k": torch.tensor([0, 50])[image % 2].int(),
        "top_p": torch.tensor([1.0, 0.9])[image // 2 % 2],
        "seed": image * 7919 - 1,
        "index": image + 1000,
        "position": (image * 13).int(),
    }


def _inputs_mix(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    shape = case["images"], case["vocabulary"]
    return {
        "cond": normal(generator, dtype, *shape, scale=3.0),
        "null": normal(generator, dtype, *shape, scale=3.0),
        "scale": _parameters(case["images"])["cfg_scale"][:, None],
    }


def _inputs_sample(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    logits = normal(generator, dtype, 2 * case["images"], case["vocabulary"], scale=3.0)
    return {"logits": logits, **_parameters(case["images"])}


def _run_filter(i: Inputs, backend: str | None) -> tuple[Tensor]:
    """As probabilities: -inf has no error to speak of."""
    logits = i["logits"][: len(i["temperature"])]
    return (filter_logits(logits, i["temperature"], i["top_k"], i["top_p"], backend=backend).softmax(-1),)


def _plain_filter(i: Inputs) -> tuple[Tensor]:
    rows = []
    for logits, temperature, top_k, top_p in zip(i["logits"], i["temperature"], i["top_k"], i["top_p"], strict=False):
        logits = logits / temperature
        if 0 < top_k < len(logits):
            logits = logits.masked_fill(logits < logits.sort().values[-top_k], float("-inf"))
        order = logits.argsort(descending=True, stable=True)
        probabilities = logits[order].softmax(-1)
        dropped = probabilities.cumsum(-1) - probabilities > (top_p if top_p < 1 else 2)
        rows.append(logits.index_fill(0, order[dropped], float("-inf")).softmax(-1))
    return (torch.stack(rows),)


def _plain_sample(i: Inputs) -> tuple[Tensor]:
    null = i["logits"][i["null_row"].long()]
    guided = torch.where(i["null_row"][:, None] >= 0, i["cfg_scale"][:, None], 1.0)
    cond = i["logits"][i["cond_row"].long()]
    mixed = torch.where(guided == 1, cond, null + (cond - null) * guided)
    probabilities = _plain_filter({**i, "logits": mixed})[0]
    noise = gumbel_noise(i["seed"], i["index"], i["position"], mixed.shape[1])
    return ((mixed / i["temperature"][:, None]).masked_fill(probabilities == 0, float("-inf")).add(noise).argmax(-1),)


CFG_MIX = OpSpec(
    name="cfg_mix",
    cases=CASES,
    dtypes=(torch.float32,),
    inputs=_inputs_mix,
    run=lambda i, backend: (cfg_mix(i["cond"], i["null"], i["scale"], backend=backend),),
    plain=lambda i: (i["null"] + (i["cond"] - i["null"]) * i["scale"],),
    bytes=lambda c, size: 3 * c["images"] * c["vocabulary"] * size,
    flops=lambda c: 3 * c["images"] * c["vocabulary"],
)
FILTER_LOGITS = OpSpec(
    name="filter_logits",
    cases=CASES,
    dtypes=(torch.float32,),
    inputs=_inputs_sample,
    run=_run_filter,
    plain=_plain_filter,
    truth=_plain_filter,
    bytes=lambda c, size: 2 * c["images"] * c["vocabulary"] * size,
    flops=lambda c: c["images"] * c["vocabulary"],
)
CFG_SAMPLE = OpSpec(
    name="cfg_sample",
    cases=CASES,
    dtypes=(torch.float32,),
    inputs=_inputs_sample,
    run=lambda i, backend: (cfg_sample(*i.values(), backend=backend),),
    plain=_plain_sample,
    truth=_plain_sample,
    bytes=lambda c, size: (2 * c["vocabulary"] * size + 56) * c["images"],
    flops=lambda c: 5 * c["images"] * c["vocabulary"],
)
