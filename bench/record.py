"""One measured run as one JSON file: device, commit, date and command beside every figure."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from retinar.bench import machine
from retinar.bench.timing import Limits
from retinar.engine.errors import InputError
from retinar.engine.files import write_json

FORMAT = 2


def document(
    device: str, rows: Sequence[Mapping[str, object]], limits: Mapping[str, Limits], tests: Mapping[str, object]
) -> dict[str, object]:
    """The content of a result file. ``rows``: one a measured case; ``limits``: by dtype; ``tests``: what passed."""
    return {
        "format": FORMAT,
        "device": machine.device_name(device),
        "kind": device,
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "python": platform.python_version(),
        "commit": machine.commit(),
        "date": now(),
        "command": command(),
        "limits": {name: limit._asdict() for name, limit in limits.items()},
        "tests": dict(tests),
        "rows": [dict(row) for row in rows],
    }


def now() -> str:
    """The date and time of a result."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command() -> str:
    """The command line that made this process, as a person would type it again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else [Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def path_of(folder: Path, content: Mapping[str, Any]) -> Path:
    """FOLDER/<device>/<date>-<commit>.json: where a document is saved, and what lies beside it is named after."""
    stamp = content["date"].replace(":", "").replace("+0000", "Z")
    return folder / machine.slug(content["device"]) / f"{stamp}-{(content['commit'] or 'nocommit')[:12]}.json"


def save(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the document to its `path_of` and return that."""
    path = path_of(folder, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a result file. Raises InputError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Expected a result of `retinar bench` at {path}, found {error}: check the path.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"Expected a result of format {FORMAT} at {path}, found another file: run `retinar bench`.")
    return content
