"""Several processes of one run, as torchrun starts them, without its agent (which would import torch once more)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.conftest import ROOT


def start_processes(count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """``python -m ARGUMENTS...`` by ranks, on a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**kept, **common, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]], seconds: float = 300) -> tuple[list[int], list[str]]:
    """Their exit codes and what they said on stderr, by rank; none is left behind."""
    try:
        told = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], told


def run_processes(count: int, *arguments: str) -> list[str]:
    """Start them, and what they said; all must succeed."""
    codes, told = finish(start_processes(count, *arguments))
    assert codes == [0] * count, "\n".join(told)
    return told
