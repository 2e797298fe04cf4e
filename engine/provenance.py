"""What made an image, as text: enough to make it again, and nothing about when, where or by whom.

The fields travel in ``PIL.Image.info`` and as text chunks of the PNG. ``codes`` holds the codes themselves (base64 of
little-endian uint16, or uint32 for codebooks beyond 65,536), so that a comparison can say how many differ and the
image can be decoded again without sampling.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinar import __version__
from retinar.engine.errors import InputError
from retinar.engine.request import Asked, Request, SamplingParams, label_name, make_request

SOFTWARE = "retinar"
FIELDS = (
    *("software", "version", "synthetic", "checkpoint", "tokenizer", "label", "class", "seed", "index", "parameters"),
    *("dtype", "implementation", "codes", "codes_sha256", "pixels_sha256"),
)
OF_CODES = ("tokenizer", "codes", "codes_sha256")
"""Fields that images of a model without codes do not have."""
UNSAVED = "unsaved"  # in place of a digest, for weights that came from no file
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What PIL raises for files that are no image, cut, or damaged.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Origin:
    """The part of a provenance that all images of a sampler share. Digests are SHA-256 in hexadecimal; ``tokenizer`` is
    None for a model without codes, whose ``vocab_size`` is 0."""

    checkpoint: str
    tokenizer: str | None
    dtype: str
    implementation: dict[str, Any]
    classes: tuple[str, ...]
    vocab_size: int


def implementation(runner: str, backend: str, isa: str | None, device: torch.device) -> dict[str, Any]:
    """Everything besides weights and parameters that may change bits: runner, kernels, instruction set, torch,
    threads.
    """
    found: dict[str, Any] = {"runner": runner, "backend": backend, "device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version(), "triton": version("triton") if find_spec("triton") else None}
    else:
        found |= {"isa": isa, "torch_isa": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return found


def describe(origin: Origin, request: Asked, codes_T: Tensor | None, pixels_HWC: np.ndarray) -> dict[str, str]:
    """The text fields of one image; all values are strings. Without codes, all but those of `OF_CODES`."""
    codes = b"" if codes_T is None else pack_codes(codes_T, origin.vocab_size)
    values = (
        *(SOFTWARE, __version__, "true", origin.checkpoint, origin.tokenizer or UNSAVED),
        *(label_name(request.label, origin.classes), str(request.label), str(request.stream.seed), str(request.index)),
        *(json.dumps(request.params.to_dict()), origin.dtype, json.dumps(origin.implementation)),
        *(base64.b64encode(codes).decode(), hashlib.sha256(codes).hexdigest(), pixels_sha256(pixels_HWC)),
    )
    fields = dict(zip(FIELDS, values, strict=True))
    return {name: value for name, value in fields.items() if codes_T is not None or name not in OF_CODES}


def expected(origin: Origin, request: Asked) -> dict[str, str]:
    """The fields known before an image is made, but for version and implementation: what a resume compares."""
    codes_T = None if origin.tokenizer is None else torch.zeros(0, dtype=torch.int64)
    known = describe(origin, request, codes_T, np.zeros((0, 0, 3), np.uint8))
    free = ("codes", "codes_sha256", "pixels_sha256", "version", "implementation")
    return {name: value for name, value in known.items() if name not in free}


def pixels_sha256(pixels_HWC: np.ndarray) -> str:
    """SHA-256 of the RGB bytes in row order."""
    return hashlib.sha256(np.ascontiguousarray(pixels_HWC).tobytes()).hexdigest()


def pack_codes(codes_T: Tensor, vocab_size: int) -> bytes:
    """Codes as little-endian uint16 (uint32 where the vocabulary needs it)."""
    return codes_T.numpy().astype("<u2" if vocab_size <= 1 << 16 else "<u4").tobytes()


def unpack_codes(text: str, vocab_size: int) -> Tensor:
    """The inverse of the ``codes`` field: int64 [block_size]."""
    data = np.frombuffer(base64.b64decode(text), "<u2" if vocab_size <= 1 << 16 else "<u4")
    return torch.from_numpy(data.astype(np.int64))


@dataclass(frozen=True)
class Record:
    """What an image file says of itself, with the file's own pixels."""

    fields: dict[str, str]
    implementation: dict[str, Any]
    pixels_HWC: np.ndarray

    @property
    def untouched(self) -> bool:
        """Whether the pixels are those that were written."""
        return self.fields["pixels_sha256"] == pixels_sha256(self.pixels_HWC)


@dataclass(frozen=True)
class Provenance(Record):
    """A provenance read back from an image file of the transformer's."""

    request: Request


def read(path: Path | str) -> Provenance:
    """The provenance of a PNG of the transformer's. InputError when the file is no whole image or says nothing complete
    about itself.
    """
    found = read_record(path)
    with told_damage(path):
        params = SamplingParams(**json.loads(found.fields["parameters"]))
        request = make_request(
            int(found.fields["index"]), int(found.fields["class"]), params, int(found.fields["seed"])
        )
        base64.b64decode(found.fields["codes"], validate=True)
        return Provenance(found.fields, found.implementation, found.pixels_HWC, request)


def read_record(path: Path | str, without: Sequence[str] = ()) -> Record:
    """What a PNG of ours says, unread but for the implementation. InputError when the file is no whole image, or lacks
    a field other than those of ``without``.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_SIGNATURE))  # before the rest, which may be a video of gigabytes or endless
            data = start + file.read() if start == _SIGNATURE else start
        _check_chunks(data)
        with Image.open(io.BytesIO(data)) as image:
            fields = {name: str(image.info[name]) for name in FIELDS if name in image.info}
            pixels_HWC = np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"expected an image file, found nothing at {path}; check the path") from error
    except _UNREADABLE as error:
        raise InputError(f"expected a whole PNG made by retinar, but {path} cannot be read ({error})") from error
    missing = [name for name in FIELDS if name not in fields and name not in without]
    if missing:
        raise InputError(
            f"expected a PNG made by retinar generate, but {path} carries no {missing[0]} among its text chunks "
            "(editors and converters drop them); use the original file"
        )
    with told_damage(path):
        made_by = json.loads(fields["implementation"])
        if not isinstance(made_by, dict):
            raise ValueError(f"the implementation is {made_by!r}")
        return Record(fields, made_by, pixels_HWC)


@contextmanager
def told_damage(path: Path | str) -> Iterator[None]:
    """Fields that cannot be what was written are an InputError that names the file."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(f"the provenance in {path} is damaged ({error}); use the original file") from error


def _check_chunks(data: bytes) -> None:
    """ValueError unless ``data`` is a PNG with every checksum right and nothing missing: decoders forgive more than
    that.
    """
    place, kind = len(_SIGNATURE), b""
    if data[:place] != _SIGNATURE:
        raise ValueError("it is no PNG")
    while kind != b"IEND":
        length = int.from_bytes(data[place : place + 4])
        kind, end = data[place + 4 : place + 8], place + 8 + length
        if len(data) < end + 4 or zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise ValueError("it is cut off or damaged")
        place = end + 4
    if place != len(data):
        raise ValueError("something follows its end")
