"""retinar (RETINa, AutoRegressive): class-conditional synthesis of colour fundus photographs.

The public names are resolved on first use, so that ``import retinar`` costs nothing and needs no compiled module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Sampler", "__version__", "load"]

# In a source checkout the rooms engine/, kernels/, train/ and bench/ lie beside this package: appending the checkout's
# root to __path__ makes them importable as retinar.engine and so on, as an installed wheel maps them.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT))

if TYPE_CHECKING:
    from retinar.engine.checkpoint import load_gpt as load
    from retinar.engine.sampler import Sampler


def __getattr__(name: str) -> object:
    if name == "Sampler":
        from retinar.engine.sampler import Sampler

        return Sampler
    if name == "load":
        from retinar.engine.checkpoint import load_gpt

        return load_gpt
    raise AttributeError(f"module 'retinar' has no attribute {name!r}")
