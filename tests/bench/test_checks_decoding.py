"""The checks of a GPU's graphs where there is none: the padded steps, interpreted; and that they find what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retinar.bench import checks_decoding
from retinar.engine.graphs import GraphRunner
from retinar.kernels import ops

pytestmark = pytest.mark.interpreted
CHECKS = checks_decoding.replay, checks_decoding.invariance


@pytest.mark.parametrize("check", CHECKS)
def test_the_padded_steps_are_right(check: Callable[..., str | None]) -> None:
    assert check("cpu", torch.float32) is None


def test_a_replay_of_old_inputs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph that was captured over other memory would: it always draws what the first step drew."""
    drawn: list[Tensor] = []
    step = GraphRunner.step

    def stale(self: GraphRunner, inputs: ops.StepInputs) -> Tensor:
        drawn.append(step(self, inputs).clone())
        return drawn[0][:1].expand(len(drawn[-1]))

    monkeypatch.setattr(GraphRunner, "step", stale)
    wrong = checks_decoding.replay("cpu", torch.float32)
    assert wrong is not None and "graphs of steps, at first" in wrong and "images differ" in wrong


def test_bits_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = GraphRunner.step

    def other(self: GraphRunner, inputs: ops.StepInputs) -> Tensor:
        return (step(self, inputs) + (len(inputs.tokens_B) > 3)) % 48

    monkeypatch.setattr(GraphRunner, "step", other)
    wrong = checks_decoding.invariance("cpu", torch.float32)
    assert wrong is not None and wrong.startswith("batch invariance, pages of 16 slots: the codes of")
