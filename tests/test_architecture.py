"""The arrows between the rooms, read from the import statements of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "kernels": set(),
    "engine": {"kernels"},
    "train": {"engine", "kernels"},
    "bench": {"train", "engine", "kernels"},
    "retinar": {"bench", "train", "engine"},
}
# What the other rooms may take from the kernels: the facade, the specs where FLOPs or bytes are counted, and the list
# of the GPU kernels where their machine code is looked at.
KERNELS_FACE = {"ops", "spec", "aot"}


def files() -> list[Path]:
    return sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, relative ones resolved, `from a import b` as a.b."""
    here = path.relative_to(ROOT).with_suffix("").parts
    package = (() if here[0] == "retinar" else ("retinar",)) + here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    wrong = []
    for line, module in imported(path):
        parts = module.split(".")
        if parts[0] in ALLOWED and parts[0] != "retinar":
            wrong.append(f"line {line}: bare import of the room {parts[0]}")
        if parts[0] != "retinar" or len(parts) < 2:
            continue
        target = parts[1] if parts[1] in ALLOWED else "retinar"
        if target == room or module == "retinar.__version__":
            continue
        if target not in ALLOWED[room]:
            wrong.append(f"line {line}: {room} imports {module}")
        if target == "kernels" and (len(parts) < 3 or parts[2] not in KERNELS_FACE):
            wrong.append(f"line {line}: {module} is not ops, spec or aot")
    assert not wrong, f"{path.relative_to(ROOT)}: " + "; ".join(wrong)


def test_rooms_are_namespace_folders() -> None:
    """A regular package named kernels, engine, train or bench could shadow another's on PyPI."""
    for room in set(ALLOWED) - {"retinar"}:
        assert not (ROOT / room / "__init__.py").exists(), f"{room}/__init__.py must not exist"


def test_the_walk_sees_the_tree() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in files()}
    assert found == set(ALLOWED)
