"""What happens to a step whose gradient is not finite, or far larger than those before it."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from retinar.engine.errors import InputError

#: Gradient norms that a spike is held against; none is called a spike before a quarter of them is there.
MEMORY = 100
#: So many steps left out in a row are no accident.
MOST_SKIPPED = 20


class Guard:
    """``allows`` says whether a step's gradient is to be applied. ``policy``, ``spike``: as TrainConfig.guard, .spike;
    ``tells``: whether to say so on stderr.

    With policy "stop" and no spike nothing is read from the device: what is not finite is then found when the step is
    logged, and nothing is saved in between.
    """

    def __init__(self, policy: Literal["stop", "skip"], spike: float | None, *, tells: bool = True) -> None:
        self.policy, self.spike, self.tells = policy, spike, tells
        self.skips = policy == "skip"
        self._norms: deque[float] = deque(maxlen=MEMORY)
        self._in_a_row = 0

    def allows(self, step: int, norm: Tensor, describe: Callable[[int], str]) -> bool:
        """Whether to apply a gradient of this norm (before clipping, the same in every process). ``describe`` names the
        images of a step. InputError when the policy is to stop, or after 20 steps left out in a row."""
        if not self.skips and self.spike is None:
            return True
        value = float(norm)
        if self.spike is None or len(self._norms) < MEMORY // 4:
            limit = math.inf
        else:
            limit = self.spike * statistics.median(self._norms)
        if math.isfinite(value) and value <= limit:
            self._norms.append(value)
            self._in_a_row = 0
            return True
        usual = "" if math.isinf(limit) else f" (usual: {limit / (self.spike or 1):.4g})"
        found = f"a gradient of norm {value:.4g}{usual} at step {step + 1}, {describe(step)}"
        self._in_a_row += 1
        if not self.skips or self._in_a_row > MOST_SKIPPED:
            many = f", as in the {MOST_SKIPPED} steps before" if self._in_a_row > MOST_SKIPPED else ""
            raise InputError(
                f"Expected an ordinary gradient, found {found}{many}: look at these images, lower optim.lr, or set "
                "guard=skip to leave such steps out."
            )
        if self.tells:
            print(f"left out {found}.", file=sys.stderr, flush=True)
        return False

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"norms": list(self._norms), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._norms.extend(state.get("norms", ()))
        self._in_a_row = int(state.get("in_a_row", 0))


def batch_names(images: Any, names: list[str] | None) -> str:
    """The images of a step in words: "images a.jpg, b.jpg and 30 more"; without names their numbers."""
    words = [names[i] if names else str(i) for i in images]
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return f"images {', '.join(words[:4])}{more}"
