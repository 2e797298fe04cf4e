"""The native decoder: packed weights, its own threads, and one call a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinar.kernels.decode_step.checks import check_inputs, check_weights
from retinar.kernels.decode_step.types import DecodeWeights, StepInputs
from retinar.kernels.native import native_module
from retinar.kernels.paged_attention import check_cache
from retinar.kernels.rope_attention.rope import check_rope


class NativeDecoder:
    """A model's weights packed for the CPU, and ``threads`` threads that run its steps.

    ``isa`` names an instruction set (one of ``native_module().isas()``), ``pin`` binds each thread to a processor.
    ValueError where the module or the instruction set cannot run here, the weights do not fit together or are neither
    fp32 nor bf16, or there is no thread.
    """

    def __init__(
        self,
        weights: DecodeWeights,
        *,
        int8: bool = False,
        threads: int = 1,
        pin: bool = False,
        isa: str | None = None,
    ) -> None:
        module, reason = native_module()
        if module is None:
            raise ValueError(reason)
        dtype = weights.output_VD.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the native decoder takes float32 and bfloat16, found {dtype}; cast the weights")
        width, rows = weights.tok_embedding_VD.shape[1], weights.wqkv[0].shape[0]
        head_dim = rows // (weights.n_head + 2 * weights.n_kv_head)
        check_weights(weights, head_dim)
        check_rope("decode_step", weights.rope_NC2, 1, head_dim)
        if weights.rope_NC2.dtype != torch.float32:
            raise ValueError(f"the native decoder takes a rope table in float32, found {weights.rope_NC2.dtype}")
        if threads < 1:
            raise ValueError(f"the native decoder takes at least one thread, found {threads}")
        self._layers, self._heads, self._dtype = len(weights.wqkv), (weights.n_kv_head, head_dim), dtype
        hidden, self.vocabulary = weights.w2[0].shape[1], weights.output_VD.shape[0]
        layers = zip(
            weights.attention_norm, weights.wqkv, weights.wo, weights.ffn_norm, weights.w13, weights.w2, strict=True
        )

        def pack(weight_NK: Tensor, gated: bool = False) -> Tensor:
            return _quantised(module, weight_NK, gated) if int8 else _packed(module, weight_NK, gated)

        #: What a step's time goes to, in the order of ``seconds``.
        self.phases: tuple[str, ...] = module.phases
        self._decoder = module.Decoder(
            [width, weights.n_head, weights.n_kv_head, head_dim, hidden, self.vocabulary],
            weights.eps,
            [weights.cls_embedding_CD.contiguous(), weights.tok_embedding_VD.contiguous()],
            [
                [a.contiguous(), pack(qkv), pack(o), f.contiguous(), pack(w13, True), pack(w2)]
                for a, qkv, o, f, w13, w2 in layers
            ],
            weights.norm_D.contiguous(),
            pack(weights.output_VD),
            weights.rope_NC2.contiguous(),
            threads,
            pin,
            isa,
        )  # fmt: skip

    def step(
        self,
        k_cache_LPSGD: Tensor,
        v_cache_LPSGD: Tensor,
        inputs: StepInputs,
        k_scale_LPSG: Tensor | None = None,
        v_scale_LPSG: Tensor | None = None,
        *,
        seconds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As ``decode_step``: (codes int64 [I], logits fp32 [B, V]). int8 caches come with their fp32 scales.

        To ``seconds`` float64 [len(phases)] are added the seconds of each of :attr:`phases`.

        ValueError for dtypes and shapes that do not fit; tokens, positions, rows and page numbers are trusted.
        """
        self._check(k_cache_LPSGD, v_cache_LPSGD, inputs, k_scale_LPSG, v_scale_LPSG)
        if seconds is not None and (seconds.dtype != torch.float64 or seconds.shape != (len(self.phases),)):
            raise ValueError(
                f"decode_step: expected seconds as torch.float64 [{len(self.phases)}], found {seconds.dtype} "
                f"{tuple(seconds.shape)}"
            )
        codes_I = torch.empty(inputs.cond_row_I.shape, dtype=torch.int64)
        logits_BV = torch.empty(inputs.tokens_B.shape[0], self.vocabulary)
        caches = k_cache_LPSGD, v_cache_LPSGD, k_scale_LPSG, v_scale_LPSG
        results = [codes_I, logits_BV] if seconds is None else [codes_I, logits_BV, seconds]
        self._decoder.step(*caches, *(each.contiguous() for each in inputs), *results)
        return codes_I, logits_BV

    def _check(self, k_cache: Tensor, v_cache: Tensor, inputs: StepInputs, *scales: Tensor | None) -> None:
        if k_cache.dim() != 5 or k_cache.shape[0] != self._layers:
            raise ValueError(
                f"decode_step: expected caches [{self._layers}, pages, slots, kv heads, head dim], found "
                f"{tuple(k_cache.shape)}"
            )
        int8 = k_cache.dtype == torch.int8 or any(each is not None for each in scales)
        check_cache("decode_step", k_cache, v_cache, self._heads, torch.int8 if int8 else self._dtype)
        for each in scales if int8 else ():
            fits = each is not None and each.dtype == torch.float32 and each.is_contiguous()
            if each is None or not fits or each.shape != k_cache.shape[:-1]:
                found = None if each is None else f"{each.dtype} {tuple(each.shape)}"
                raise ValueError(
                    f"decode_step: expected scales of int8 caches contiguous in torch.float32 "
                    f"{list(k_cache.shape[:-1])}, found {found}"
                )
        check_inputs(inputs, torch.float32)


def huge_pages(memory: Tensor) -> Tensor:
    """Asks the system for pages of 2 MiB for a fresh CPU tensor, where it has them; returns it."""
    module, _ = native_module()
    if module is not None and memory.is_contiguous() and memory.numel():
        module.huge_pages(memory.view(torch.uint8) if memory.dim() else memory)
    return memory


def _quantised(module: Any, weight_NK: Tensor, gated: bool) -> Tensor:
    """int8 with a scale for each output, both packed, and the sums of each output's weights."""
    weight_NK = weight_NK.float()
    scale_N1 = weight_NK.abs().amax(1, keepdim=True) / 127
    int8_NK = (weight_NK / scale_N1.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    sums_N1 = int8_NK.sum(1, keepdim=True, dtype=torch.int32).view(torch.float32)
    parts = int8_NK, scale_N1, sums_N1
    counts = [module.packed_elements(each, gated) * each.itemsize for each in parts]
    out = huge_pages(torch.empty(sum(counts), dtype=torch.int8))
    for part, place in zip(parts, out.split(counts), strict=True):
        module.pack(part, place.view(part.dtype), gated)
    return out


def _packed(module: Any, weight_NK: Tensor, gated: bool = False) -> Tensor:
    weight_NK = weight_NK.contiguous()
    out = huge_pages(torch.empty(module.packed_elements(weight_NK, gated), dtype=weight_NK.dtype))
    module.pack(weight_NK, out, gated)
    return out
