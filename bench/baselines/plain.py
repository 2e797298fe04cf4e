"""Plain torch: op by op, and through torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F

from retinar.bench.baselines.table import Baseline, Run
from retinar.kernels.spec import Inputs, OpSpec, plain_attention

# A training step's ops, and the tokenizer's. The others' plain versions are loops in Python over rows.
COMPILED = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "swiglu_packed",
    "rope_attention",
    "rope_attention_packed",
    "rope_attention_dropout",
    "linear_cross_entropy",
    "vq_lookup",
)


def plain_of(spec: OpSpec) -> Run:
    """The spec's plain version; of attention one whose mask torch draws on the inputs' device, as its users would have
    it (the documented mask is slow to make in plain torch)."""
    return _attention if spec.name.startswith("rope_attention") else spec.plain


def eager(spec: OpSpec, device: str, size: str = "") -> Run:
    """Plain torch, op by op."""

    def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with torch.device(device):  # where some plain versions make their index tensors
            return plain_of(spec)(inputs)

    return run


def compiled(function: Run, size: str) -> Run:
    """Through torch.compile. The exercise takes all of it but the code generator, which needs minutes on a CPU."""
    made = torch.compile(function, backend="aot_eager" if size == "exercise" else "inductor", fullgraph=True)

    def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        # Donated buffers allow one backward for a forward; a kept graph is run many times.
        with torch._functorch.config.patch(donated_buffer=False):
            return made(inputs)

    return run


def _attention(i: Inputs) -> tuple[torch.Tensor]:
    return plain_attention(i, partial(F.dropout, p=i["dropout_p"]))


def compile_absent(device: str, size: str) -> str | None:
    """Why nothing is compiled at this size, or None."""
    if size == "cpu":
        return "compiling takes minutes on a CPU; it is measured on a GPU"
    return None


BASELINES = (
    Baseline("torch eager", None, lambda device, size: None, eager),
    Baseline(
        "torch.compile",
        COMPILED,
        compile_absent,
        lambda spec, device, size: compiled(plain_of(spec), size),
    ),
)
