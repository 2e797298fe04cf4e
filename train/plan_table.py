"""A memory plan as text, from its JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GIB = 2**30
MEMORY = ("parameters", "gradients", "optimizer", "ema", "gathered", "activations", "peak", "needed")


def table(plan: Mapping[str, Any]) -> str:
    """Every row in GiB, the setting to take, and what the figures rest on."""
    gpus = f"{plan['gpus']} GPUs" if plan["gpus"] > 1 else "one GPU"
    title = (
        f"{plan['recipe']}: {plan['parameters'] / 1e6:,.1f} M parameters, {plan['precision']}, batch "
        f"{plan['batch_size']}, on {gpus} of {plan['gpu_memory_gib']:g} GiB. GiB on each:"
    )
    averaged = any(row["ema_bytes"] for row in plan["rows"])
    memory = [name for name in MEMORY if name != "ema" or averaged]
    header = ["mode", "checkpointing", "parts", "images", *memory, "fits"]
    rows = [
        [
            _mode(row, plan["gpus"]),
            row["activation_checkpointing"],
            str(row["accumulation"]),
            str(row["micro_batch"]),
            *(f"{row[f'{name}_bytes'] / GIB:.2f}" for name in memory),
            "yes" if row["fits"] else "no",
        ]
        for row in plan["rows"]
    ]
    notes = [
        "parts: accumulation; images: of a part on one GPU; gathered: weights put together and gradients not reduced.",
        "gathered and activations are as at the peak, which may come before there are gradients.",
        *plan["assumptions"],
    ]
    return "\n".join([title, "", *_aligned(header, rows), "", _advice(plan), "", *notes])


def _mode(row: Mapping[str, Any], gpus: int) -> str:
    if gpus == 1:
        return "one process"
    return f"hsdp {row['replicas']} x {gpus // row['replicas']}" if row["parallel"] == "hsdp" else str(row["parallel"])


def _advice(plan: Mapping[str, Any]) -> str:
    best = plan["best"]
    if best is None:
        least = min(row["needed_bytes"] for row in plan["rows"]) / GIB
        return f"Nothing fits: the least is {least:.1f} GiB. More GPUs, larger ones, or a smaller model."
    mode = [f"parallel={best['parallel']}"] if plan["gpus"] > 1 else []
    replicas = [f"replicas={best['replicas']}"] if best["replicas"] else []
    checkpointing = f"activation_checkpointing={best['activation_checkpointing']}"
    settings = [*mode, *replicas, checkpointing, f"accumulation={best['accumulation']}"]
    return f"Expected to be the fastest that fits: --set {' '.join(settings)}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Words to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    for line in [header, *rows]:
        padded = (f"{cell:{'<' if column < 2 else '>'}{widths[column]}}" for column, cell in enumerate(line))
        yield "  ".join(padded).rstrip()
