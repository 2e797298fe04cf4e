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
from retinar.engine.request import Request, SamplingParams, label_name, make_request

SOFTWARE = "retinar"
FIELDS = (
    *("software", "version", "synthetic", "checkpoint", "tokenizer", "label", "class", "seed", "index", "parameters"),
    *("dtype", "implementation", "codes", "codes_sha256", "pixels_sha256"),
)
UNSAVED = "unsaved"  # in place of a digest, for weights that came from no file
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What PIL raises for files that are no image, cut, or damaged.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Origin:
    """The part of a provenance that all images of a sampler share. Digests are SHA-256 in hexadecimal."""

    checkpoint: str
    tokenizer: str
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


def describe(origin: Origin, request: Request, codes_T: Tensor, pixels_HWC: np.ndarray) -> dict[str, str]:
    """The text fields of one image; all values are strings."""
    codes = pack_codes(codes_T, origin.vocab_size)
    values = (
        *(SOFTWARE, __version__, "true", origin.checkpoint, origin.tokenizer),
        *(label_name(request.label, origin.classes), str(request.label), str(request.stream.seed), str(request.index)),
        *(json.dumps(request.params.to_dict()), origin.dtype, json.dumps(origin.implementation)),
        *(base64.b64encode(codes).decode(), hashlib.sha256(codes).hexdigest(), pixels_sha256(pixels_HWC)),
    )
    return dict(zip(FIELDS, values, strict=True))


def expected(origin: Origin, request: Request) -> dict[str, str]:
    """The fields known before an image is made, but for version and implementation: what a resume compares."""
    known = describe(origin, request, torch.zeros(0, dtype=torch.int64), np.zeros((0, 0, 3), np.uint8))
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
class Provenance:
    """A provenance read back from an image file, with the file's own pixels."""

    fields: dict[str, str]
    request: Request
    implementation: dict[str, Any]
    pixels_HWC: np.ndarray

    @property
    def untouched(self) -> bool:
        """Whether the pixels are those that were written."""
        return self.fields["pixels_sha256"] == pixels_sha256(self.pixels_HWC)


def read(path: Path | str) -> Provenance:
    """The provenance of a PNG of ours. InputError when the file is no whole image or says nothing complete about
    itself.
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
    missing = [name for name in FIELDS if name not in fields]
    if missing:
        raise InputError(
            f"expected a PNG made by retinar generate, but {path} carries no {missing[0]} among its text chunks "
            "(editors and converters drop them); use the original file"
        )
    try:
        params = SamplingParams(**json.loads(fields["parameters"]))
        request = make_request(int(fields["index"]), int(fields["class"]), params, int(fields["seed"]))
        made_by = json.loads(fields["implementation"])
        if not isinstance(made_by, dict):
            raise ValueError(f"the implementation is {made_by!r}")
        base64.b64decode(fields["codes"], validate=True)
        return Provenance(fields, request, made_by, pixels_HWC)
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
