"""Registration with torch.library and the choice of an implementation: the boilerplate of every op, once.

An op is one schema under the ``retinar::`` namespace with several implementations ("backends") behind it. Without
``backend`` the first backend in the device's order that can take the arguments runs; with ``backend`` exactly that one
runs, or the call raises ``ValueError`` with the reason. ``Library.define``/``impl`` is used rather than ``custom_op``
because it costs a third of the overhead for each call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

NAMESPACE = "retinar"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: The order in which a device tries its backends when the caller names none.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}

#: Every op of this process by name, for `backends`; filled by the constructor, as torch's own registry is.
REGISTRY: dict[str, Op] = {}

Reason = str | None


def _never(*_: Any) -> Reason:
    return None


@functools.cache
def interpreting() -> bool:
    """Whether Triton's own interpreter runs the kernels (``TRITON_INTERPRET=1`` before start): on a CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def preference(device: str) -> tuple[str, ...]:
    """`PREFERENCE` of a device type; under Triton's interpreter a CPU goes the way that a GPU goes."""
    return PREFERENCE["cuda" if interpreting() else device]


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    ``unavailable()`` says why this machine cannot run it, ``unsupported(*args)`` why these arguments cannot be run by
    it; both return None when all is well.
    """

    run: Callable[..., Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    unavailable: Callable[[], Reason] = _never
    unsupported: Callable[..., Reason] = _never


class Op:
    """A registered op; calling it goes through the dispatcher, so autograd, compile and fake tensors all see it.

    Args:
        schema: torch schema without the namespace; arguments take no defaults, and the keyword ``str? backend=None``
            is appended by this class.
        reference: the definition, in plain torch.
        fake: shapes and dtypes of the results, for tracing.
    """

    def __init__(self, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.name = schema[: schema.index("(")]
        arguments, _, result = schema.rpartition(") ->")
        LIBRARY.define(f"{arguments}, *, str? backend=None) ->{result}")
        for device in PREFERENCE:
            LIBRARY.impl(self.name, partial(self._run, device), device.upper())
        self.qualified_name = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(self.qualified_name, _without_backend(fake), lib=LIBRARY)
        self.backends: dict[str, Implementation] = {"reference": Implementation(reference)}
        REGISTRY[self.name] = self
        self._overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def register(self, backend: str, implementation: Implementation) -> None:
        """Adds a backend; a later ``gpu.py`` or ``cpu`` binding calls this and nothing else."""
        self.backends[backend] = implementation

    def differentiate(self, backward: Callable[..., Any], save: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        """Registers the gradient: ``save(ctx, inputs, output)`` before, ``backward(ctx, *grads)`` after.

        ``ctx.backend`` holds the backend that the caller named, or None.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
            ctx.backend = keyword_only_inputs.get("backend")
            save(ctx, inputs, output)

        def once(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():  # only under create_graph=True: the gradient's own gradient would be a silent 0
                raise RuntimeError(f"{self.name} can be differentiated once: call backward without create_graph=True")
            return backward(ctx, *grads)

        torch.library.register_autograd(self.qualified_name, once, setup_context=setup_context, lib=LIBRARY)

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        return self._overload(*args, backend=backend)

    def own(self, backend: str | None) -> str | None:
        """``backend`` where this op has it, else None: how a backward op follows the backend of its forward op."""
        return backend if backend in self.backends else None

    def _run(self, device: str, *args: Any, backend: str | None = None) -> Any:
        # An op states its own dtypes: autocast, still active down here, must not change them behind its back.
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._select(device, args, backend)
        return self._select(device, args, backend)

    def _select(self, device: str, args: Sequence[Any], backend: str | None) -> Any:
        if backend is not None:
            return self.named(backend, device, args).run(*args)
        for name in preference(device):
            candidate = self.backends.get(name)
            if candidate is not None and self._obstacle(candidate, device, args) is None:
                return candidate.run(*args)
        raise RuntimeError(f"{self.name} has no implementation for {device}")  # the reference takes every argument

    def named(self, backend: str, device: str, args: Sequence[Any]) -> Implementation:
        """The backend of that name; ValueError with the reason when it is unknown or cannot run these arguments."""
        if backend not in self.backends:
            raise ValueError(unknown_backend(self.name, backend, self.backends))
        reason = self._obstacle(self.backends[backend], device, args)
        if reason is not None:
            raise ValueError(f"{self.name}: backend {backend!r} cannot run this call: {reason}")
        return self.backends[backend]

    @staticmethod
    def _obstacle(implementation: Implementation, device: str, args: Sequence[Any]) -> Reason:
        if device not in implementation.devices:
            return f"it runs on {' and '.join(implementation.devices)}, the tensors are on {device}"
        return implementation.unavailable() or implementation.unsupported(*args)


def backends(name: str) -> dict[str, Reason]:
    """The backends of an op, each with None or the reason why this machine cannot run it."""
    if name not in REGISTRY:
        raise ValueError(f"unknown op {name!r}; the ops are {', '.join(sorted(REGISTRY))}")
    found = {}
    for backend, implementation in REGISTRY[name].backends.items():
        absent = implementation.devices == ("cuda",) and not torch.cuda.is_available()
        found[backend] = "no CUDA device was found" if absent else implementation.unavailable()
    return found


def preferred(name: str, device: str) -> str:
    """The backend that a call on a device type ("cpu", "cuda") takes first where it names none."""
    found = backends(name)
    taken = (each for each in preference(device) if each in found and found[each] is None)
    return next(each for each in taken if device in REGISTRY[name].backends[each].devices)


def unknown_backend(op: str, backend: str, known: Sequence[str] | dict[str, Any]) -> str:
    """The sentence for a backend name that an op does not have."""
    return f"{op}: unknown backend {backend!r}; this op has {', '.join(sorted(known))}"


def refuse_gradients(op: str, *tensors: torch.Tensor) -> None:
    """Raises where a caller expects gradients from an op that has none."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"{op} is for inference and has no gradient: call it under torch.inference_mode() or no_grad()"
        )


def same_device(op: str, *tensors: torch.Tensor) -> None:
    """Raises unless all tensors lie on one device."""
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"{op}: expected all tensors on one device, found {', '.join(sorted(devices))}; move them first"
        )


def _without_backend(fake: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, backend: str | None = None) -> Any:
        return fake(*args)

    return wrapped
