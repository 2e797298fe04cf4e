"""What is asked for: the parameters of one image, checked at the door and trusted inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Protocol

from retinar.engine.errors import InputError
from retinar.engine.philox import Stream, stream

LARGEST = 1e6  # of scale and temperature: far beyond use, and no product with an fp32 logit overflows


@dataclass(frozen=True)
class SamplingParams:
    """How codes are drawn (upstream's semantics; LLAMAGEN: mix, temperature, top-k, top-p, softmax, draw).

    ``cfg_scale``: guidance; at most 1 means none (one row an image). ``temperature``: divides the logits (0 is greedy
    up to 1e-5). ``top_k``: 0 is off. ``top_p``: 1 is off. ``cfg_interval``: k >= 0 guides the first code and decode
    iterations 0..k only; -1 guides all. Raises InputError for anything outside these ranges.
    """

    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_interval: int = -1

    def __post_init__(self) -> None:
        for name, kind in (
            ("cfg_scale", float),
            ("temperature", float),
            ("top_k", int),
            ("top_p", float),
            ("cfg_interval", int),
        ):
            object.__setattr__(self, name, _number(name, getattr(self, name), kind))
        if not 0 <= self.cfg_scale <= LARGEST:
            raise InputError(
                f"cfg-scale must be a number from 0 to a million (up to 1: no guidance), got {self.cfg_scale}; try 2.0"
            )
        if not 0 <= self.temperature <= LARGEST:
            raise InputError(f"temperature must be a number from 0 to a million, got {self.temperature}; try 1.0")
        if self.top_k < 0:
            raise InputError(f"top-k must be 0 (off) or a number of codes, got {self.top_k}; try 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be more than 0 and at most 1 (off), got {self.top_p}; try 1.0")
        if self.cfg_interval < -1:
            raise InputError(
                f"cfg-interval must be -1 (always guided) or a step from 0 up, got {self.cfg_interval}; try -1"
            )

    def guided_codes(self, block_size: int) -> int:
        """How many of an image's codes, from the first, are drawn with guidance: the length of its null row."""
        if self.cfg_scale <= 1:
            return 0
        if self.cfg_interval < 0:
            return block_size
        # code 0 comes from the prefill; decode iteration i draws code i + 1 and is guided while i <= cfg_interval
        return min(block_size, self.cfg_interval + 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Params(Protocol):
    """The parameters of a sampler, whichever."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One image to make, by whatever sampler: its stream, its class (an index into the class table), its parameters."""

    stream: Stream
    label: int
    params: Params

    @property
    def index(self) -> int:
        return self.stream.index


@dataclass(frozen=True, slots=True)
class Request(Asked):
    """One image to make by the transformer."""

    params: SamplingParams


def make_request(index: int, label: int, params: SamplingParams, seed: int = 0) -> Request:
    """A request with a checked stream; InputError when seed or index leave their range."""
    return Request(stream(seed, index), label, params)


def resolve_label(label: int | str, classes: Sequence[str], num_classes: int) -> int:
    """A class name, or its number as int or text, as an index below ``num_classes``; InputError names the known."""
    if isinstance(label, str) and label in classes:
        return list(classes).index(label)
    text = str(label).strip()
    if not isinstance(label, bool) and text.isascii() and text.isdigit() and len(text) < 10 and int(text) < num_classes:
        return int(text)
    known = ", ".join(classes) if classes else f"the numbers 0 to {num_classes - 1}"
    raise InputError(f"unknown label {label!r}: this checkpoint knows {known}; choose one of them")


def label_name(label: int, classes: Sequence[str]) -> str:
    """The class's name, or its number where the checkpoint names none (upstream's files)."""
    return classes[label] if label < len(classes) else str(label)


def _number(name: str, value: object, kind: type) -> float | int:
    flag = name.replace("_", "-")
    if isinstance(value, bool) or not isinstance(value, Real) or (kind is int and value % 1 != 0):
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"{flag} must be {wanted}, got {value!r}; correct it")
    try:
        return kind(value)
    except OverflowError:
        raise InputError(f"{flag} is far too large; correct it") from None
