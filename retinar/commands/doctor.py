"""``retinar doctor``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinar.engine.progress import Progress


@dataclass
class Doctor:
    """What this machine can run, which backends, and why not.

    Example: retinar doctor
    """

    def run(self, progress: Progress) -> dict[str, object]:
        """Look at the machine; the summary is `retinar.bench.machine.describe()` and the package's version."""
        from retinar import __version__
        from retinar.bench import machine

        return {"retinar": __version__, **machine.describe()}

    def render(self, found: Mapping[str, Any]) -> str:
        """The summary as text."""
        from retinar import ui
        from retinar.bench import machine

        native = found["native"]
        gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB, compute {gpu['compute']}" for gpu in found["gpus"]]
        facts = {
            "retinar": found["retinar"],
            "python": found["python"],
            "torch": f"{found['torch']} ({'CUDA ' + found['cuda'] if found['cuda'] else 'no CUDA'})",
            "system": found["system"],
            "cpu": f"{found['cpu']}, {found['cores']} cores, {found['torch_threads']} threads for torch",
            "memory": f"{found['memory_gib']} GiB",
            "gpu": "; ".join(gpus) or "none: everything runs on the CPU",
            "native module": f"loaded, {native['isa']}" if native["loaded"] else f"not loaded: {native['reason']}",
        }
        names = list(dict.fromkeys(backend for backends in found["ops"].values() for backend in backends))
        cells = [
            [op, *("" if name not in backends else "no" if backends[name] else "yes" for name in names)]
            for op, backends in found["ops"].items()
        ]
        why = dict.fromkeys(
            f"{name}: {reason}" for backends in found["ops"].values() for name, reason in backends.items() if reason
        )
        packages = [
            [name, found["packages"][name] or "missing", use if found["packages"][name] else f"{use}: {get}"]
            for name, (use, get) in machine.OPTIONAL.items()
        ]
        return "\n".join(
            [
                *ui.table(["this machine", ""], [[name, str(value)] for name, value in facts.items()]),
                "",
                *ui.table(["op", *names], cells),
                *(f"  no {reason}" for reason in why),
                "",
                *ui.table(["package", "version", "for"], packages),
            ]
        )
