"""PatchGAN against upstream's numbers, and its shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retinar.train.patchgan import PatchGAN


def test_golden_logits(golden: Path) -> None:
    """Training mode: BatchNorm takes the statistics of the batch, and moves its running ones."""
    expected = load_file(golden / "vq_expected.safetensors")
    weights = {k.removeprefix("disc.weights."): v for k, v in expected.items() if k.startswith("disc.weights.")}
    model = PatchGAN(ndf=16, n_layers=3)
    model.load_state_dict(weights)  # strict: upstream's keys and shapes
    logits = model.train()(expected["images"])
    torch.testing.assert_close(logits, expected["disc.logits_real"], rtol=0, atol=1e-5)
    assert not torch.equal(model.main[3].running_mean, weights["main.3.running_mean"])


@pytest.mark.parametrize(
    ("layers", "widths", "patches"), [(1, [8, 16], 30), (3, [8, 16, 32, 64], 6), (4, [8, 16, 32, 64, 64], 2)]
)
def test_widths_double_up_to_eight_times(layers: int, widths: list[int], patches: int) -> None:
    model = PatchGAN(ndf=8, n_layers=layers)
    convs = [module for module in model.main if isinstance(module, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [*widths, 1]
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1, patches, patches)


def test_init() -> None:
    torch.manual_seed(0)
    model = PatchGAN(ndf=64)
    convs = [module for module in model.main if isinstance(module, torch.nn.Conv2d)]
    norms = [module for module in model.main if isinstance(module, torch.nn.BatchNorm2d)]
    assert [conv.bias is not None for conv in convs] == [True, False, False, False, True]
    assert convs[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert norms[-1].weight.mean().item() == pytest.approx(1, abs=0.005)
    assert norms[-1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not norms[-1].bias.any()
