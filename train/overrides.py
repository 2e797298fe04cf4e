"""``--set key=value`` for any config made of nested frozen dataclasses: each value is read as its field's type."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from retinar.engine.errors import InputError

Config = TypeVar("Config")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of ``config`` with ``key=value`` texts applied, each read as its field's type (``optim.lr=1e-4``).

    Tuples are comma-separated, "none" is None where the field allows it. All are applied at once, so values that
    depend on each other may come in any order. InputError names an unknown key's near matches, and what a bad value
    should have been.
    """
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"Expected --set key=value, found {text!r}")
        owner, hint = _find(config, key)
        changes[key] = _parse(key, value.strip(), hint)
        if dataclasses.is_dataclass(hint):
            inner = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(hint))
            raise InputError(f"Expected one value to set, found the group {key!r} of {owner}: set one of {inner}")
    return _replace(config, changes)


def _find(config: Any, key: str) -> tuple[str, Any]:
    """The owning class's name and the type of a dotted key."""
    names = list(flatten(dataclasses.asdict(config)))
    kind: Any = type(config)
    for part in key.split("."):
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            last = key.rsplit(".", 1)[-1]
            near = [name for name in names if name.rsplit(".", 1)[-1] == last]
            near += [name for name in difflib.get_close_matches(key, names, n=3, cutoff=0.5) if name not in near]
            hint = f"did you mean {' or '.join(near)}?" if near else "--print-config lists every key"
            raise InputError(f"Expected a key of {type(config).__name__}, found {key!r}: {hint}")
        owner, kind = kind.__name__, hints[part]
    return owner, kind


def _parse(key: str, text: str, hint: Any) -> Any:
    """``text`` as a value of type ``hint``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null"):
            return None
        (hint,) = [kind for kind in arguments if kind is not type(None)]
        return _parse(key, text, hint)
    if origin is Literal:
        if text in arguments:
            return text
        raise InputError(f"Expected {key} to be one of {', '.join(map(str, arguments))}, found {text!r}")
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        if arguments[-1] is not Ellipsis and len(parts) != len(arguments):
            raise InputError(f"Expected {len(arguments)} comma-separated values for {key}, found {text!r}")
        return tuple(_parse(key, part, arguments[0]) for part in parts)
    if hint is bool:
        lowered = text.lower()
        if lowered in ("true", "yes", "on", "1"):
            return True
        if lowered in ("false", "no", "off", "0"):
            return False
        raise InputError(f"Expected true or false for {key}, found {text!r}")
    if hint in (int, float):
        try:
            value = hint(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            noun = "a whole number" if hint is int else "a finite number"
            raise InputError(f"Expected {noun} for {key}, found {text!r}")
        return value
    return text


def _replace(config: Any, changes: Mapping[str, Any]) -> Any:
    """dataclasses.replace with dotted keys."""
    arguments: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(head, {})[rest] = value
        else:
            arguments[head] = value
    for head, inner in groups.items():
        arguments[head] = _replace(getattr(config, head), inner)
    try:
        return dataclasses.replace(config, **arguments)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
