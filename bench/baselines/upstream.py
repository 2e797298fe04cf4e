"""LlamaGen's own code, from a clone that the user names (``--upstream``). Nothing of it is in this repository."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retinar.engine.config import GPTConfig
from retinar.engine.errors import InputError

NEEDED = ("autoregressive/models/gpt.py", "autoregressive/models/generate.py")
ENDED = "its process ended; what it said is on stderr"
PROCESS = Path(__file__).with_name("upstream_process.py")


def check_clone(path: Path) -> Path:
    """The clone's absolute path; InputError when it is none."""
    missing = [name for name in NEEDED if not (path / name).is_file()]
    if missing:
        raise InputError(
            f"Expected a clone of LlamaGen at {path}, found no {' and no '.join(missing)} there: "
            "give --upstream the folder that `git clone https://github.com/FoundationVision/LlamaGen` makes."
        )
    return path.resolve()


def model_arguments(config: GPTConfig) -> dict[str, Any]:
    """A config in the words of its ModelArgs."""
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_kv_head": config.n_kv_head,
        "dim": config.dim,
        "multiple_of": config.multiple_of,
        "vocab_size": config.vocab_size,
        "num_classes": config.num_classes,
        "block_size": config.block_size,
        "class_dropout_prob": config.class_dropout_prob,
        "model_type": "c2i",
        "cls_token_num": 1,
    }


class Upstream:
    """A process that measures with the clone's code; a context manager that ends it. ``script`` is what it runs:
    sampling (`upstream_process`) or training (`upstream_training`)."""

    def __init__(self, clone: Path, script: Path = PROCESS) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(clone)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def over(self) -> bool:
        """Whether the process has ended: nothing more can be asked of it."""
        return self._process.poll() is not None

    def measure(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The process's answer (see ``script``), or {"error": why there is none}; ends it when it takes longer
        than ``seconds``: the first time its start is among them."""
        assert self._process.stdin is not None
        if self.over:
            return {"error": ENDED}
        try:
            self._process.stdin.write(json.dumps(dict(job)) + "\n")
            self._process.stdin.flush()
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            self._process.kill()
            return {"error": f"it took longer than the {seconds:.0f} s that were left", "late": True}
        except OSError as error:
            return {"error": f"{ENDED} ({error.strerror})"}
        if reply is None:
            self._process.wait()
            return {"error": ENDED}
        return json.loads(reply)

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._replies.put(line)
        except ValueError:  # closed
            pass
        self._replies.put(None)
