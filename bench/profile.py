"""Where a step's time goes, by kernel, and whether our kernels do the work: ``make gpu`` writes it down.

`TRAINING` is a step of training, `DECODING` one of sampling.

On a GPU a kernel's launches carry the name of its Triton function. Under Triton's interpreter every launch is a range
of that name (`retinar.kernels.launch`), so the same profile of a tiny step can be read without a GPU.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from retinar.kernels import aot

GROUP_OF_OP: Mapping[str, str] = {
    "rms_norm": "norm",
    "swiglu": "gate",
    "rope_attention": "attention",
    "linear_cross_entropy": "loss",
}
"""The ops of a training step of the transformer, by their folder."""

GROUP_OF_DECODING: Mapping[str, str] = {
    "decode_step": "embedding",
    "paged_attention": "attention",
    "linear": "matrix products",
    "cfg_sample": "sampling",
    "rms_norm": "norm",
    "swiglu": "gate",
}
"""Those of a decode step. Norm and gate have kernels of their own only where the products are not ours."""

OTHERS: tuple[tuple[str, str], ...] = (
    ("optimizer", r"adam|multi_tensor_apply|_foreach_|optimizer|l2norm|lpnorm"),
    ("attention", r"flash|fmha|scaled_dot_product|attention"),
    ("loss", r"cross_entropy|nll_loss|softmax"),
    ("norm", r"rms_norm|layer_norm"),
    ("gate", r"silu|swiglu"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|gemv|splitk|aten::(mm|addmm|bmm|matmul|linear)$"),
)
"""Groups of what is not ours, by its name."""

# What torch would run for a norm, a gate, attention or the loss if our kernels did not: in an eager step none appears.
REPLACED = frozenset(
    f"aten::{name}"
    for name in (
        "softmax", "_softmax", "log_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data",
        "rms_norm", "_fused_rms_norm", "silu", "silu_backward", "sigmoid", "cross_entropy_loss", "nll_loss_forward",
        "scaled_dot_product_attention", "rsqrt",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A kind of step. ``groups``: group of each op in it, by the op's folder; ``replaced``: torch's operators for them.

    ``each``: every kernel that is named after its op is needed; else of each of ``needed`` ops any one.
    ``own``: groups in which every kernel has to be ours.
    """

    groups: Mapping[str, str]
    replaced: frozenset[str] = frozenset()
    each: bool = False
    needed: tuple[str, ...] = ()
    own: frozenset[str] = frozenset()


TRAINING = Work(GROUP_OF_OP, REPLACED, each=True)
DECODING = Work(
    GROUP_OF_DECODING,
    needed=("decode_step", "paged_attention", "linear", "cfg_sample"),
    own=frozenset({"attention", "loss", "norm", "gate", "matrix products"}),
)
"""Torch's softmax is of the group "loss" by its name. A graph that is replayed shows kernels and no operators."""
DECODING_BLAS = Work(
    GROUP_OF_DECODING, needed=("decode_step", "paged_attention", "cfg_sample"), own=DECODING.own - {"matrix products"}
)
"""With torch's products, as steps of many rows are meant to be."""


class Span(NamedTuple):
    """A kernel on the device, or an operator or range on the host: its own seconds, and the names it runs inside."""

    name: str
    seconds: float
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """Calls and seconds of one name."""

    name: str
    group: str
    op: str | None
    calls: int
    seconds: float


def ours(work: Work = TRAINING) -> dict[str, str]:
    """Name -> op of every Triton kernel of a step's ops; none without Triton."""
    if importlib.util.find_spec("triton") is None:
        return {}
    return {kernel.name: kernel.op for kernel in aot.kernels() if kernel.op in work.groups}


def expected() -> set[str]:
    """The kernels without which a training step does not use ours for every norm, gate, attention and loss, both ways.

    Of an op those named after it and "forward" or "backward"; its others prepare or add up for them, or serve sizes
    that no step has. Of an op with none so named (the loss, whose forward does both), all.
    """
    kernels = ours()
    found = set()
    for op in GROUP_OF_OP:
        names = {name for name, owner in kernels.items() if owner == op}
        found |= {name for name in names if name.startswith((f"{op}_forward", f"{op}_backward"))} or names
    return found


def missing(found: Iterable[Found], work: Work) -> list[str]:
    """Kernels, or ops none of whose kernels a step shows, although it should."""
    shown = {each.name for each in found if each.op is not None}
    if work.each:
        return sorted(expected() - shown)
    kernels = ours(work)
    return sorted(op for op in work.needed if not any(kernels[name] == op for name in shown))


def kernel_names(profile: torch.profiler.profile) -> set[str]:
    """Those of our training kernels that a profile shows."""
    known = ours()
    return {name for span in spans(profile) for name in (_plain(span.name),) if name in known}


def replaced(profile: torch.profiler.profile, work: Work = TRAINING) -> set[str]:
    """What in a profile does what a kernel of ours should do: operators of torch, kernels of others."""
    operators = {each.name for each in profile.events() or () if each.name in work.replaced}
    found = summed(spans(profile), ours(work), work) if work.own else []
    return operators | {each.name for each in found if each.op is None and each.group in work.own}


def spans(profile: torch.profiler.profile) -> Iterator[Span]:
    """The device's kernels, where the profile has any; else what ran on the host, with its own time."""
    events = list(profile.events() or ())
    device = [
        each
        for each in events
        if each.device_type == DeviceType.CUDA and not getattr(each, "is_user_annotation", False)
    ]
    if device:
        for each in device:
            yield Span(each.name, each.time_range.elapsed_us() / 1e6)
        return
    for each in events:
        within, parent = [], each.cpu_parent
        while parent is not None:
            within.append(parent.name)
            parent = parent.cpu_parent
        yield Span(each.name, each.self_cpu_time_total / 1e6, tuple(within))


def summed(all_spans: Iterable[Span], known: Mapping[str, str], work: Work = TRAINING) -> list[Found]:
    """Spans by name, slowest first. What runs inside one of our kernels (the interpreter's work) is the kernel's."""
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    groups: dict[str, str] = {}
    for span in all_spans:
        owner = next((_plain(name) for name in span.within if _plain(name) in known), None)
        name = owner or (_plain(span.name) if _plain(span.name) in known else span.name)
        seconds[name] = seconds.get(name, 0.0) + span.seconds
        calls[name] = calls.get(name, 0) + (owner is None)
        groups.setdefault(name, group_of((name, *span.within), known, work))
    found = [Found(name, groups[name], known.get(name), calls[name], seconds[name]) for name in seconds]
    return sorted(found, key=lambda each: -each.seconds)


def group_of(names: Iterable[str], known: Mapping[str, str], work: Work = TRAINING) -> str:
    """The group of a kernel, by its name, else by what it runs inside (the optimizer's small operators)."""
    for name in names:
        if name in known:
            return work.groups[known[name]]
        for group, pattern in OTHERS:
            if re.search(pattern, name, flags=re.IGNORECASE):
                return group
    return "other"


def describe(
    profile: torch.profiler.profile, *, steps: int = 1, top: int = 12, work: Work = TRAINING
) -> dict[str, Any]:
    """A profile as plain data: groups, our kernels, the longest of the others, and what is missing; times of a step."""
    found = summed(spans(profile), ours(work), work)
    total = sum(each.seconds for each in found) or 1.0
    groups: dict[str, float] = {}
    for each in found:
        groups[each.group] = groups.get(each.group, 0.0) + each.seconds
    return {
        "groups": [
            {"group": group, "seconds": seconds / steps, "share": seconds / total}
            for group, seconds in sorted(groups.items(), key=lambda item: -item[1])
        ],
        "kernels": [_line(each, steps) | {"op": each.op} for each in found if each.op is not None],
        "others": [_line(each, steps) for each in found if each.op is None][:top],
        "missing": missing(found, work),
        "replaced": sorted(replaced(profile, work)),
    }


def _line(found: Found, steps: int) -> dict[str, Any]:
    calls, seconds = found.calls / steps, found.seconds / steps
    return {"name": found.name[:120], "group": found.group, "calls": calls, "seconds": seconds}


def _plain(name: str) -> str:
    """A kernel's name without the underscores that make its Triton function private."""
    return name.strip("_")


def activities(device: str) -> list[ProfilerActivity]:
    """What to record."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
