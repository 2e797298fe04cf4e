"""What of a comparison is done, and the time it took: kept in a file, so that it goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retinar.engine.errors import InputError
from retinar.engine.files import write_json


class Plan:
    """OUT/plan.json: what is done, and the seconds that each stage took over all calls."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self._file, self._content = file, content

    @classmethod
    def open(cls, out: Path, asked: Mapping[str, Any]) -> Plan:
        """Begin the folder ``out``, or go on with it; InputError when it holds something else. ``asked``: JSON values
        that a continuation must share (those that an older plan does not have are not compared)."""
        file, wanted = out / "plan.json", {"format": 1, "asked": dict(asked)}
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                differing = [key for key in asked if content["asked"].get(key, asked[key]) != asked[key]]
                content["done"].keys(), content["seconds"].keys()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"Expected a plan in {file}, found a damaged one ({error}): remove it.") from error
            if differing:
                raise InputError(
                    f"Expected the settings that {out} was begun with, found another {', '.join(differing)}: "
                    "give the same ones to go on, or choose another --out."
                )
            return cls(file, content)
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"Expected an empty or a begun --out, found other files in {out}: choose another.")
        out.mkdir(parents=True, exist_ok=True)
        plan = cls(file, {**wanted, "done": {}, "seconds": {}})
        plan._write()
        return plan

    def __contains__(self, key: tuple[str, str]) -> bool:
        return "/".join(key) in self._content["done"]

    def __getitem__(self, key: tuple[str, str]) -> dict[str, Any]:
        return dict(self._content["done"]["/".join(key)])

    def keep(self, key: tuple[str, str], values: Mapping[str, Any]) -> None:
        """Note a stage as done."""
        self._content["done"]["/".join(key)] = json.loads(json.dumps(values, default=str))
        self._write()

    def seconds(self, stage: str) -> float:
        """What a stage has taken so far, interrupted calls included."""
        return float(self._content["seconds"].get(stage, 0.0))

    def timed(self, stage: str) -> _Timed:
        """Adds the time of a block to a stage, also when it is interrupted."""
        return _Timed(self, stage)

    def add(self, stage: str, seconds: float) -> None:
        """Add to a stage's time."""
        self._content["seconds"][stage] = self.seconds(stage) + seconds
        self._write()

    def _write(self) -> None:
        write_json(self._file, self._content)


class _Timed:
    def __init__(self, plan: Plan, stage: str) -> None:
        self._plan, self._stage, self._began = plan, stage, 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._plan.add(self._stage, time.monotonic() - self._began)
