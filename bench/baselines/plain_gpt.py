"""The transformer as one writes it in plain torch, module by module as LlamaGen's is: what training is compared with
where there is no clone of it.

RMSNorm op by op, the rotation as stacked pairs in fp32, torch's scaled_dot_product_attention, gate and up as two
products, logits as a whole in fp32. State dicts have upstream's names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinar.engine.config import GPTConfig
from retinar.kernels import ops


class PlainNorm(nn.Module):
    """In fp32, cast back, then times the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BNX: Tensor) -> Tensor:
        wide_BNX = x_BNX.float()
        scale_BN1 = torch.rsqrt(wide_BNX.square().mean(-1, keepdim=True) + self.eps)
        return (wide_BNX * scale_BN1).type_as(x_BNX) * self.weight


class PlainAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.dropout_p = config.attn_dropout_p
        self.wqkv = nn.Linear(config.dim, (self.heads + 2 * self.groups) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(config.resid_dropout_p)

    def forward(self, x_BNX: Tensor, rope_NC2: Tensor) -> Tensor:
        qkv_BNHD = self.wqkv(x_BNX).unflatten(-1, (-1, self.head_dim))
        q_BNHD, k_BNGD, v_BNGD = qkv_BNHD.split([self.heads, self.groups, self.groups], dim=2)
        q_BHND, k_BGND = rotate(q_BNHD, rope_NC2).transpose(1, 2), rotate(k_BNGD, rope_NC2).transpose(1, 2)
        k_BHND, v_BHND = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k_BGND, v_BNGD.transpose(1, 2)))
        dropout_p = self.dropout_p if self.training else 0.0
        o_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True, dropout_p=dropout_p)
        return self.resid_dropout(self.wo(o_BHND.transpose(1, 2).flatten(2)))


class PlainFeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout_p)

    def forward(self, x_BNX: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x_BNX)) * self.w3(x_BNX)))


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = PlainAttention(config), PlainFeedForward(config)
        self.attention_norm = PlainNorm(config.dim, config.norm_eps)
        self.ffn_norm = PlainNorm(config.dim, config.norm_eps)

    def forward(self, x_BNX: Tensor, rope_NC2: Tensor) -> Tensor:
        h_BNX = x_BNX + self.attention(self.attention_norm(x_BNX), rope_NC2)
        return h_BNX + self.feed_forward(self.ffn_norm(h_BNX))


class ClassTable(nn.Module):
    """Labels give way to the null class, the last row, with a probability in training."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.class_rows, config.dim)
        self.null, self.dropout_p = config.num_classes, config.class_dropout_prob

    def forward(self, labels_B: Tensor) -> Tensor:
        if self.training and self.dropout_p > 0:
            dropped_B = torch.rand(len(labels_B), device=labels_B.device) < self.dropout_p
            labels_B = torch.where(dropped_B, self.null, labels_B)
        return self.embedding_table(labels_B)


class PlainGPT(nn.Module):
    """Without stochastic depth. The forward of `upstream_training.Loop`: (logits fp32 [B, N, V], loss)."""

    rope_NC2: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.cls_embedding = ClassTable(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm = PlainNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        rope_NC2 = ops.rope_table(config.grid, config.grid, config.head_dim, base=config.rope_base)
        self.register_buffer("rope_NC2", rope_NC2, persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.zeros_(self.output.weight)

    def forward(self, idx: Tensor, cond_idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        h_BNX = torch.cat([self.cls_embedding(cond_idx)[:, None], self.tok_embeddings(idx)], dim=1)
        h_BNX = self.tok_dropout(h_BNX)
        for layer in self.layers:
            h_BNX = layer(h_BNX, self.rope_NC2[: h_BNX.shape[1]])
        logits_BNV = self.output(self.norm(h_BNX)).float()
        return logits_BNV, F.cross_entropy(logits_BNV.flatten(0, 1), targets.flatten())


def rotate(x_BNHD: Tensor, rope_NC2: Tensor) -> Tensor:
    """In fp32, pairs (2i, 2i + 1), then cast back."""
    pairs = x_BNHD.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos_N1C, sin_N1C = (each[:, None] for each in rope_NC2.unbind(-1))
    turned = torch.stack([even * cos_N1C - odd * sin_N1C, odd * cos_N1C + even * sin_N1C], dim=-1)
    return turned.flatten(-2).type_as(x_BNHD)
