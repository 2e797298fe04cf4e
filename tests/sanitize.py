"""Runs pytest with another build of the compiled module: ``python tests/sanitize.py MODULE.so [pytest's arguments]``.

`make sanitize` gives it one that stops at bad addresses and undefined behaviour. The module takes its place before
anything imports it, so neither the installed one nor the checkout changes.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

NAME = "retinar.kernels._native"


def main(arguments: list[str]) -> int:
    path = Path(arguments[0]).resolve()
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a compiled module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module

    from retinar.kernels.native import native_module

    if native_module()[0] is not module:
        raise SystemExit(f"the package loaded another module than {path}: {native_module()}")
    print(f"testing {path}", flush=True)
    return int(pytest.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
