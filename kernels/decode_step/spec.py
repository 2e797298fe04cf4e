"""Spec of decode_step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retinar.kernels.decode_step import DecodeWeights, StepInputs, decode_step
from retinar.kernels.launch import kernel_dtypes
from retinar.kernels.opspec import FLOATS, Case, Inputs, OpSpec, normal
from retinar.kernels.paged_attention.spec import PAGED_ATTENTION
from retinar.kernels.rope_attention import rope_table

CASES = (
    {"images": 1, "layers": 1, "heads": 1, "groups": 1, "dim": 4, "hidden": 7, "vocabulary": 11, "page": 1},
    {"images": 3, "layers": 2, "heads": 4, "groups": 2, "dim": 12, "hidden": 61, "vocabulary": 101, "page": 5},
    {"images": 2, "layers": 2, "heads": 2, "groups": 2, "dim": 64, "hidden": 256, "vocabulary": 256, "page": 16},
)
CLASSES, GRID = 2, 6


def make_weights(case: Case, dtype: torch.dtype, generator: torch.Generator) -> DecodeWeights:
    """Random weights of a size that keeps activations near one."""
    width, rows = case["heads"] * case["dim"], (case["heads"] + 2 * case["groups"]) * case["dim"]

    def matrices(outer: int, inner: int) -> list[Tensor]:
        return [normal(generator, dtype, outer, inner, scale=inner**-0.5) for _ in range(case["layers"])]

    norms = [(1 + normal(generator, torch.float32, width, scale=0.1)).to(dtype) for _ in range(2 * case["layers"] + 1)]
    return DecodeWeights(
        cls_embedding_CD=normal(generator, dtype, CLASSES + 1, width),
        tok_embedding_VD=normal(generator, dtype, case["vocabulary"], width),
        attention_norm=norms[: case["layers"]],
        wqkv=matrices(rows, width),
        wo=matrices(width, width),
        ffn_norm=norms[case["layers"] : -1],
        w13=matrices(2 * case["hidden"], width),
        w2=matrices(width, case["hidden"]),
        norm_D=norms[-1],
        output_VD=normal(generator, dtype, case["vocabulary"], width, scale=width**-0.5),
        n_head=case["heads"],
        n_kv_head=case["groups"],
        eps=1e-5,
        rope_NC2=rope_table(GRID, GRID, case["dim"]),
    )


def _inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Guided pairs at different positions, the first image at its class token; unused slots hold NaN."""
    images = case["images"]
    image, rows = torch.arange(images), torch.arange(2 * images)
    positions = (image * 9).repeat(2).int()
    columns = (9 * images) // case["page"] + 1
    pages = len(rows) * columns
    shape = (case["layers"], pages, case["page"], case["groups"], case["dim"])
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    table = torch.randperm(pages, generator=generator).view(-1, columns).int()
    for row in rows.tolist():
        place = torch.arange(int(positions[row]))
        for cache in caches:
            old = normal(generator, dtype, case["layers"], len(place), case["groups"], case["dim"])
            cache[:, table[row, place // case["page"]].long(), place % case["page"]] = old
    code = torch.randint(case["vocabulary"], (images,), generator=generator).repeat(2)
    label = torch.where(rows < images, rows % CLASSES, CLASSES)
    step = StepInputs(
        tokens_B=torch.where(positions == 0, label, code),
        positions_B=positions,
        block_table_BM=table,
        cond_row_I=image.int(),
        null_row_I=(image + images).int(),
        cfg_scale_I=torch.full((images,), 1.5),
        temperature_I=torch.ones(images),
        top_k_I=torch.zeros(images, dtype=torch.int32),
        top_p_I=torch.ones(images),
        seed_I=image + 5,
        index_I=image,
    )
    return {"weights": make_weights(case, dtype, generator), "k_cache": caches[0], "v_cache": caches[1], "step": step}


def _run(i: Inputs, backend: str | None) -> tuple[Tensor]:
    """The logits; the codes are drawn from them by cfg_sample, which has its own spec."""
    k_cache, v_cache = i["k_cache"].clone(), i["v_cache"].clone()
    return (decode_step(i["weights"], k_cache, v_cache, i["step"], backend=backend)[1],)


def _plain(i: Inputs) -> tuple[Tensor]:
    weights, step = i["weights"], i["step"]
    positions = step.positions_B.long()
    first = positions == 0
    x = torch.where(
        first[:, None],
        weights.cls_embedding_CD[step.tokens_B.where(first, 0)],
        weights.tok_embedding_VD[step.tokens_B.where(~first, 0)],
    )
    for layer in range(len(weights.wqkv)):
        normed = F.rms_norm(x, x.shape[-1:], weights.attention_norm[layer], weights.eps)
        heads, groups, dim = weights.n_head, weights.n_kv_head, i["k_cache"].shape[-1]
        q, k, v = F.linear(normed, weights.wqkv[layer]).unflatten(-1, (-1, dim)).split([heads, groups, groups], 1)
        attention = {
            "q": q,
            "k": k,
            "v": v,
            "k_cache": i["k_cache"][layer],
            "v_cache": i["v_cache"][layer],
            "block_table": step.block_table_BM,
            "positions": step.positions_B,
            "rope": weights.rope_NC2,
        }
        x = x + F.linear(PAGED_ATTENTION.plain(attention)[0].flatten(1), weights.wo[layer])
        normed = F.rms_norm(x, x.shape[-1:], weights.ffn_norm[layer], weights.eps)
        gate, up = F.linear(normed, weights.w13[layer]).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, weights.w2[layer])
    return (F.linear(F.rms_norm(x, x.shape[-1:], weights.norm_D, weights.eps), weights.output_VD).float(),)


def _weights(case: Case) -> int:
    width = case["heads"] * case["dim"]
    attention = (2 * case["heads"] + 2 * case["groups"]) * case["dim"] * width
    return case["layers"] * (attention + 3 * case["hidden"] * width) + case["vocabulary"] * width


def _past(case: Case) -> int:
    return 2 * sum(9 * image + 1 for image in range(case["images"])) * case["layers"]


DECODE_STEP = OpSpec(
    name="decode_step",
    cases=CASES,
    dtypes=FLOATS,
    inputs=_inputs,
    run=_run,
    narrow=dict.fromkeys(("triton", "blas"), kernel_dtypes(products=True)),
    plain=_plain,
    bytes=lambda c, size: (_weights(c) + 2 * _past(c) * c["groups"] * c["dim"]) * size,
    flops=lambda c: 4 * c["images"] * _weights(c) + 4 * _past(c) * c["heads"] * c["dim"],
)
