"""Shared fixtures, one thread a test process, and the two runs of the suite.

``make test`` runs pytest twice, because Triton's compiler and its interpreter cannot share a process:

1. the ordinary run: everything but what is marked ``interpreted``; GPU kernels are compiled, not run;
2. with ``TRITON_INTERPRET=1``: only what is marked ``interpreted`` or ``both_runs``, and the files
   ``test_gpu_*.py``; the backend "triton" runs on the CPU and is the preferred one.

The choice is made here, so that both are plain pytest commands: what belongs to the other run is deselected, and a file
that has nothing for this one is not even imported.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.kernels import dispatch
from retinar.kernels.launch import triton_missing

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED_FILES = "test_gpu_"
MARKS = "mark.interpreted", "mark.both_runs", "every_backend("


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-native", action="store_true", help="fail when the compiled CPU module is not loaded (make test, CI)"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and triton_missing():
        raise pytest.UsageError(f"TRITON_INTERPRET=1, but {triton_missing()}")
    if dispatch.interpreting():
        _prepare_language_once()
    if config.getoption("--require-native"):
        from retinar.kernels import ops

        native = ops.native_info()
        if not native["loaded"]:
            raise pytest.UsageError(f"--require-native: the compiled module is not loaded ({native['reason']})")


def _prepare_language_once() -> None:
    """Spares Triton's interpreter a third of its time.

    It exchanges the functions of `triton.language` for its own at each launch, and again whenever one jit function
    calls another, although by then all are exchanged but those in `core`, which Triton's own library sees. Those it
    never puts back, so they can just as well be exchanged here, and the calls need do nothing.
    """
    from triton.language import standard
    from triton.runtime import interpreter

    interpreter._patch_lang(standard.zeros.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)


def pytest_report_header() -> str:
    if dispatch.interpreting():
        return "run: the GPU kernels under Triton's interpreter, nothing else (TRITON_INTERPRET=1)"
    missing = triton_missing()
    compiled = (
        f"GPU kernels are neither compiled nor run: {missing}" if missing else "GPU kernels are compiled, not run"
    )
    return f"run: all but the interpreter's part, which needs TRITON_INTERPRET=1; {compiled}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Files that have nothing for this run: under the interpreter, those that name neither of its marks."""
    if collection_path.suffix != ".py":
        return None
    if collection_path.name.startswith(INTERPRETED_FILES):
        return None if dispatch.interpreting() else True
    text = collection_path.read_text(encoding="utf-8") if dispatch.interpreting() else MARKS[0]
    return None if any(mark in text for mark in MARKS) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if _belongs_here(item)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not _belongs_here(item)])
        items[:] = chosen


def _belongs_here(item: pytest.Item) -> bool:
    if item.get_closest_marker("both_runs"):
        return True
    interpreted = item.path.name.startswith(INTERPRETED_FILES) or item.get_closest_marker("interpreted") is not None
    return interpreted == dispatch.interpreting()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of vectors that the public implementations produced (tests/data/golden/README.md)."""
    return ROOT / "tests" / "data" / "golden"


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real photographs in OIA-DDR's layout, beside the checkout where there are any: never to be redistributed."""
    folder = ROOT.parent / "shared" / "data" / "DR_grading"
    if not folder.is_dir():
        pytest.skip("the photographs ../shared/data/DR_grading are missing (they may not be redistributed)")
    return folder


@pytest.fixture(scope="session")
def vgg_weights() -> Path:
    """VGG16's convolutional weights for LPIPS, beside the checkout where there are any."""
    path = ROOT.parent / "shared" / "weights" / "vgg16_features_fp16.safetensors"
    if not path.is_file():
        pytest.skip("the weights ../shared/weights/vgg16_features_fp16.safetensors are missing")
    return path


@dataclass
class Ran:
    """Which backends the ops of a test ran on. ``attention`` is the name to pass where a model takes one."""

    backend: str
    ops: dict[str, set[str]] = field(default_factory=dict)

    @property
    def attention(self) -> str | None:
        return "sdpa" if self.backend == "sdpa" else None

    def note(self, op: str, backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            self.ops.setdefault(op, set()).add(backend)
            return run(*args)

        return noted


@pytest.fixture
def ran(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ran]:
    """Prefers one backend (an indirect parameter) for everything the test does, the reference where an op lacks it.

    Afterwards it must have run, and no op that has it may have run on another.
    """
    backend: str = request.param
    if backend in dispatch.REGISTRY["rms_norm"].backends:
        reason = dispatch.backends("rms_norm")[backend]
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
    noted = Ran(backend)
    for device in dispatch.PREFERENCE:
        monkeypatch.setitem(dispatch.PREFERENCE, device, tuple(dict.fromkeys((backend, "reference"))))
    for op in dispatch.REGISTRY.values():
        for name, implementation in op.backends.items():
            run = noted.note(op.name, name, implementation.run)
            monkeypatch.setitem(op.backends, name, dataclasses.replace(implementation, run=run))
    yield noted
    able = {op: names for op, names in noted.ops.items() if backend in dispatch.REGISTRY[op].backends}
    assert able, f"nothing that ran has the backend {backend}: {sorted(noted.ops)}"
    assert all(names == {backend} for names in able.values()), f"not all on {backend}: {able}"


def every_backend(*names: str) -> pytest.MarkDecorator:
    """Parametrises `ran`: these backends in the ordinary run, "triton" in the interpreted one."""
    interpreted = pytest.param("triton", marks=pytest.mark.interpreted)
    return pytest.mark.parametrize("ran", [*names, interpreted], indirect=True)
