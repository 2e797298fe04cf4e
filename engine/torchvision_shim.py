"""Importing torchvision beside a CPU-only torch.

The wheels of torchvision on the package index are CUDA builds. Beside a CPU-only torch their compiled operators do not
load, and the import fails on two operators whose schemas are then missing. ``lpips`` and ``clean-fid`` use neither, so
declaring the two schemas is enough for them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # torch forgets a Library's schemas when the object goes


def import_torchvision() -> ModuleType:
    """``torchvision``, imported; with the two schemas declared only where its own import fails for want of them.

    Raises ImportError where it is not installed. Call it before importing a package that imports torchvision.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return importlib.import_module("torchvision")
