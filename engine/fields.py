"""Reading fields of configs: names of sizes, JSON files and dicts, with errors that name the nearest known thing."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retinar.engine.errors import InputError

ConfigSource = str | Path | Mapping[str, Any]
"""A size's name, a JSON file, a checkpoint folder of ours, or the fields themselves."""

_SIZE_KEYS = ("name", "size", "gpt_model", "vq_model")


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest known names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}."


def read(source: ConfigSource, sizes: Mapping[str, dict[str, Any]], what: str) -> dict[str, Any]:
    """Names, files and folders -> a flat dict of the fields they state. Raises InputError for unknown ones."""
    if isinstance(source, Mapping):
        fields = {str(key).replace("-", "_"): value for key, value in source.items()}
        if isinstance(fields.get("config"), Mapping):  # our config.json
            return read(fields["config"], sizes, what)
        named = [fields.pop(key) for key in _SIZE_KEYS if key in fields]
        return {**_size(str(named[0]), sizes, what), **fields} if named else fields
    if isinstance(source, str) and any(source.lower() == known.lower() for known in sizes):
        return _size(source, sizes, what)  # even where a file or folder, as of a run's results, has that name
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return read(_json_object(path), sizes, what)
    return _size(str(source), sizes, what)


def _size(name: str, sizes: Mapping[str, dict[str, Any]], what: str) -> dict[str, Any]:
    for known, fields in sizes.items():
        if known.lower() == name.lower():
            return dict(fields)
    raise InputError(f"Expected a {what} or a JSON file, found {name!r}: {near(name, sizes)}")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Expected a JSON config at {path}, which cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(
            f"Expected a JSON object in {path}, found something else ({error}): correct the file."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"Expected a JSON object in {path}, found a {type(value).__name__}: correct the file.")
    return value


def strip(fields: dict[str, Any], inert: set[str], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that change nothing and those that must have the one value of ``fixed``."""
    for key, only in fixed.items():
        if key in fields and fields[key] != only:
            raise InputError(f"Expected {key} {only!r}, found {fields[key]!r}: other models are not supported.")
    return {key: value for key, value in fields.items() if key not in inert and key not in fixed}


def checked(fields: Mapping[str, Any], config: type, what: str) -> dict[str, Any]:
    """The fields, known to the dataclass ``config`` and of its types, or an InputError."""
    known = {field.name: field for field in dataclasses.fields(config)}
    for key, value in fields.items():
        if key not in known:
            raise InputError(f"Expected a {what}, found {key!r}: {near(key, known)}")
        kind = str(known[key].type)
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = {
            "int": whole,
            "int | None": whole or value is None,
            "float": whole or isinstance(value, float),
            "bool": isinstance(value, bool),
        }.get(kind, isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value))
        if not fits:
            raise InputError(f"Expected {key} as {kind}, found {value!r}: correct the config.")
    return dict(fields)


def positive(config: Any, *names: str) -> None:
    """InputError unless the named fields are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"Expected {name} above 0, found {value}: correct the config.")


def probabilities(config: Any, *names: str) -> None:
    """InputError unless the named fields lie in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise InputError(f"Expected {name} in [0, 1), found {value}: correct the config.")
