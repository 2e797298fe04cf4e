"""The transformer over codes: LlamaGen's architecture on our ops.

A sequence is the class token followed by the codes in raster order; position j predicts code j. Blocks are pre-norm,
RMSNorm, 2D rotary attention, SwiGLU; no biases, no tied weights. The class position has zeros in the rotary table (not
the identity): its query and key vanish, its value still counts.

Dropouts, all in training only: ``token_dropout_p`` on the embeddings, ``resid_dropout_p`` after the attention's output
projection, ``ffn_dropout_p`` after the feed-forward, and ``attn_dropout_p`` on the attention probabilities. The last is
what "attention dropout" means in the literature and how this project reads the paper's 0.1; upstream leaves it at 0.
Its mask comes from a counter with a seed drawn once a layer and forward from torch's default CPU generator: restoring
that generator replays it, on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from retinar.engine.config import GPTConfig
from retinar.engine.errors import InputError
from retinar.engine.upstream import from_upstream_state_dict, to_upstream_state_dict
from retinar.kernels import ops

__all__ = ["GPT", "Attention", "Block", "FeedForward", "RMSNorm", "from_upstream_state_dict", "to_upstream_state_dict"]


Recompute = Literal["none", "selective", "full"]
"""What the backward pass computes again: nothing; what is neither a matrix product nor attention; all but a block's
input."""


class Linear(nn.Linear):
    """Without bias, and left empty: GPT.init_weights fills it (the default init takes seconds and would be lost)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Left empty: GPT.init_weights fills it."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """RMSNorm: normalised in fp32, cast back, then multiplied by the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BNX: Tensor) -> Tensor:
        return ops.rms_norm(x_BNX, self.weight, self.eps)

    def add(self, x_BNX: Tensor, residual_BNX: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) in one pass; the sum has the residual's dtype."""
        return ops.add_rms_norm(x_BNX.to(residual_BNX.dtype), residual_BNX, self.weight, self.eps)


class ClassEmbedding(nn.Module):
    """The class table, the null class in its last row."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_table = Embedding(config.class_rows, config.dim)
        self.null_label, self.dropout_p = config.num_classes, config.class_dropout_prob

    def forward(self, labels_B: Tensor) -> Tensor:
        """[B, X]; in training a label gives way to the null class with probability ``class_dropout_prob``."""
        if self.training and self.dropout_p > 0:
            dropped_B = torch.rand(labels_B.shape[0], device=labels_B.device) < self.dropout_p
            labels_B = torch.where(dropped_B, self.null_label, labels_B)
        return self.embedding_table(labels_B)


class DropPath(nn.Module):
    """Stochastic depth: drops a branch for whole samples and scales the kept ones up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_BNX: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch_BNX
        keep = 1 - self.rate
        kept_B11 = branch_BNX.new_empty((branch_BNX.shape[0], 1, 1)).bernoulli_(keep).div_(keep)
        return branch_BNX * kept_B11


class Attention(nn.Module):
    """Causal attention with the 2D rotary embedding; ``wqkv`` holds the rows of q, then k, then v."""

    def __init__(self, config: GPTConfig, resid_dropout_p: float) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.dropout_p = config.attn_dropout_p
        self.wqkv = Linear(config.dim, (self.n_head + 2 * self.kv_heads) * self.head_dim)
        self.wo = Linear(config.dim, config.dim)
        self.resid_dropout = nn.Dropout(resid_dropout_p)

    def forward(self, x_BNX: Tensor, rope_NC2: Tensor, seed: Tensor | None, backend: str | None) -> Tensor:
        qkv_BNHD = self.wqkv(x_BNX).unflatten(-1, (self.n_head + 2 * self.kv_heads, self.head_dim))
        dropout_p = 0.0 if seed is None else self.dropout_p
        o_BHND = ops.rope_attention(
            qkv_BNHD, None, None, rope_NC2, heads=self.n_head, dropout_p=dropout_p, seed=seed, backend=backend
        )
        return self.resid_dropout(self.wo(o_BHND.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU; ``w13`` holds the rows of the gate (upstream's w1), then those of the other factor (w3)."""

    def __init__(self, config: GPTConfig, dropout_p: float) -> None:
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_hidden)
        self.w2 = Linear(config.ffn_hidden, config.dim)
        self.ffn_dropout = nn.Dropout(dropout_p)

    def forward(self, x_BNX: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(ops.swiglu(self.w13(x_BNX))))


class Block(nn.Module):
    """One layer: h = x + attention(norm(x)), then h + feed_forward(norm(h))."""

    def __init__(self, config: GPTConfig, drop_path_rate: float) -> None:
        super().__init__()
        replaced = config.drop_path_rate > 0  # stochastic depth stands in for both dropouts, as in upstream's training
        self.attention = Attention(config, 0.0 if replaced else config.resid_dropout_p)
        self.feed_forward = FeedForward(config, 0.0 if replaced else config.ffn_dropout_p)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(drop_path_rate)
        self.activation_checkpointing: Recompute = "none"

    def forward(self, x_BNX: Tensor, rope_NC2: Tensor, seed: Tensor | None, backend: str | None) -> Tensor:
        """[B, N, X]. Recomputation is inside, so that it is compiled and sharded with the block."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self._run(x_BNX, rope_NC2, seed, backend)
        # The seed was drawn outside, so the recomputation drops the same probabilities; the other dropouts replay
        # torch's generators.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.training}
        if self.activation_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(self._run, x_BNX, rope_NC2, seed, backend, **options)

    def _run(self, x_BNX: Tensor, rope_NC2: Tensor, seed: Tensor | None, backend: str | None) -> Tensor:
        branch_BNX = self.drop_path(self.attention(self.attention_norm(x_BNX), rope_NC2, seed, backend))
        normed_BNX, h_BNX = self.ffn_norm.add(branch_BNX, x_BNX)
        return h_BNX + self.drop_path(self.feed_forward(normed_BNX))


class GPT(nn.Module):
    """The class-conditional transformer. ``state_dict()`` has the packed layout; files have upstream's (checkpoint.py).

    ``activation_checkpointing`` ("none") is what the backward pass computes again of each block. The model may be built
    under ``torch.device("meta")``; after ``to_empty`` call ``init_weights`` or load weights.
    """

    rope_NC2: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = ClassEmbedding(config)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        last = max(config.n_layer - 1, 1)
        self.layers = nn.ModuleList(Block(config, config.drop_path_rate * i / last) for i in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.register_buffer("rope_NC2", self._rope_table(self.output.weight.device), persistent=False)
        self.init_weights()

    def _rope_table(self, device: torch.device) -> Tensor:
        config = self.config
        return ops.rope_table(config.grid, config.grid, config.head_dim, base=config.rope_base, device=device)

    @property
    def activation_checkpointing(self) -> Recompute:
        """What the backward pass computes again of each block; setting it sets all of them."""
        first: Any = self.layers[0]
        return first.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, what: Recompute) -> None:
        for block in self.layers:
            block.activation_checkpointing = what  # type: ignore[assignment]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, ``initializer_range``) for matrices and tables, ones for norms, zeros for the output."""
        for module in self.modules():
            if isinstance(module, (Linear, Embedding)):
                module.weight.normal_(0.0, self.config.initializer_range)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        self.output.weight.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts (``to``, ``half``, ``to_empty``); the rotary table is made anew, for it stays fp32."""
        self._buffers["rope_NC2"] = None
        super()._apply(fn, recurse)
        self.rope_NC2 = self._rope_table(self.output.weight.device)
        return self

    def forward(
        self, codes_BN: Tensor, labels_B: Tensor, *, attention_backend: str | None = None, return_loss: bool = False
    ) -> Tensor:
        """Logits [B, N, V] in fp32 for codes [B, N] int64 (N up to ``block_size``) and labels [B] int64.

        Position j sees the class and the codes before j; the last code is never an input. The label ``num_classes`` is
        the null class. ``attention_backend`` is ``backend`` of ``ops.rope_attention``. With ``return_loss`` the result
        is ``loss`` (so that wrappers of forward, DDP and FSDP, see it).
        """
        self._check(codes_BN, labels_B)
        h_BNX = torch.cat([self.cls_embedding(labels_B)[:, None], self.tok_embeddings(codes_BN[:, :-1])], dim=1)
        h_BNX = self.tok_dropout(h_BNX)
        rope_NC2 = self.rope_NC2[: h_BNX.shape[1]]
        for layer, seed in zip(self.layers, self._attention_seeds(h_BNX.device), strict=True):
            h_BNX = layer(h_BNX, rope_NC2, seed, attention_backend)
        h_BNX = self.norm(h_BNX)
        if return_loss:
            return ops.linear_cross_entropy(
                _autocast(h_BNX.flatten(0, 1)), _autocast(self.output.weight), codes_BN.flatten()
            )
        return self.output(h_BNX).float()

    def loss(self, codes_BN: Tensor, labels_B: Tensor, *, attention_backend: str | None = None) -> Tensor:
        """Mean cross-entropy over all codes, an fp32 scalar; the logits never exist as a whole."""
        return self(codes_BN, labels_B, attention_backend=attention_backend, return_loss=True)

    def _check(self, codes_BN: Tensor, labels_B: Tensor) -> None:
        fits = codes_BN.ndim == 2 and 0 < codes_BN.shape[1] <= self.config.block_size
        if not fits or labels_B.shape != codes_BN.shape[:1]:
            raise InputError(
                f"Expected codes [B, N] with N from 1 to {self.config.block_size} and labels [B], "
                f"found {list(codes_BN.shape)} and {list(labels_B.shape)}: reshape them."
            )

    def _attention_seeds(self, device: torch.device) -> list[Tensor] | list[None]:
        """A seed for each layer's attention dropout; None where nothing is dropped."""
        if not self.training or self.config.attn_dropout_p == 0:
            return [None] * len(self.layers)
        seeds_L = torch.randint(2**63 - 1, (len(self.layers),), dtype=torch.int64, device="cpu")
        return list(seeds_L.to(device, non_blocking=True).unbind())

    @torch.no_grad()
    def decode_weights(self, dtype: torch.dtype | None = None) -> ops.DecodeWeights:
        """The weights for ``ops.decode_step``: contiguous, in ``dtype`` (None: as they are, shared, not copied)."""

        def take(weight: Any) -> Tensor:
            return weight.detach().to(dtype or weight.dtype).contiguous()

        blocks: list[Any] = list(self.layers)
        return ops.DecodeWeights(
            cls_embedding_CD=take(self.cls_embedding.embedding_table.weight),
            tok_embedding_VD=take(self.tok_embeddings.weight),
            attention_norm=[take(block.attention_norm.weight) for block in blocks],
            wqkv=[take(block.attention.wqkv.weight) for block in blocks],
            wo=[take(block.attention.wo.weight) for block in blocks],
            ffn_norm=[take(block.ffn_norm.weight) for block in blocks],
            w13=[take(block.feed_forward.w13.weight) for block in blocks],
            w2=[take(block.feed_forward.w2.weight) for block in blocks],
            norm_D=take(self.norm.weight),
            output_VD=take(self.output.weight),
            n_head=self.config.n_head,
            n_kv_head=self.config.kv_heads,
            eps=self.config.norm_eps,
            rope_NC2=self.rope_NC2,
        )


def _keep_products(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Selective recomputation: results of matrix products and of attention are kept, they cost the most."""
    schema = getattr(op, "_schema", None)
    kept = schema is not None and schema.name in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = frozenset(
    {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise"}
    | {"retinar::rope_attention", "retinar::rope_attention_packed"}
    | {f"aten::_scaled_dot_product_{kind}" for kind in ("flash_attention", "flash_attention_for_cpu")}
    | {f"aten::_scaled_dot_product_{kind}" for kind in ("efficient_attention", "cudnn_attention")}
)


def _autocast(tensor: Tensor) -> Tensor:
    """In the dtype of the autocast region, if any: our ops take tensors as they are, where ``F.linear`` would cast."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor
