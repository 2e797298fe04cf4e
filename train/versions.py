"""Which code and which libraries a run used."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinar import __version__

_ROOT = Path(__file__).resolve().parent.parent


def commit() -> str | None:
    """The commit of the source checkout this code runs from ("-dirty" if files differ from it); None outside of one."""
    if not (_ROOT / "pyproject.toml").is_file():
        return None  # installed: a repository around site-packages is somebody else's
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def session() -> dict[str, Any]:
    """Commit, versions and time of this process, for a run's config.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {
        "retinar": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "versions": versions, "device": device, "started": now}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
