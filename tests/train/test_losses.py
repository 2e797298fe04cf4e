"""The tokenizer's losses: values known by hand and from the public implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retinar.engine.checkpoint import load_tokenizer
from retinar.train.losses import (
    LossParts,
    adversarial_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
    total_loss,
)
from tests.train.pictures import picture_config


def parts(**changes: torch.Tensor | None) -> LossParts:
    values = [torch.tensor(float(value)) for value in (2, 3, 5, 7, 11)]
    return LossParts(*values)._replace(**changes)


def test_reconstruction() -> None:
    made, images = torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([0.0, -1.0, -1.0, 0.0])
    assert reconstruction_loss(made, images, "l2").item() == pytest.approx((4 + 0.25) / 4)
    assert reconstruction_loss(made, images, "l1").item() == pytest.approx(2.5 / 4)
    assert reconstruction_loss(made.bfloat16(), images, "l2").dtype == torch.float32


def test_hinge_leaves_what_is_beyond_the_margin_alone() -> None:
    real, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0], requires_grad=True)
    loss = discriminator_loss(real, made)
    assert loss.item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    loss.backward()
    assert made.grad is not None
    assert made.grad.tolist() == pytest.approx([0.0, 1 / 6, 1 / 6])
    assert generator_loss(torch.tensor([1.0, 2.0, 6.0])).item() == -3.0


def test_the_discriminator_joins_at_its_step_counted_from_one() -> None:
    config = picture_config(disc_start=5, disc_weight=0.25)
    assert [adversarial_weight(config, step) for step in (0, 3, 4, 100)] == [0.0, 0.0, 0.25, 0.25]
    assert adversarial_weight(picture_config(disc_start=0), 0) == 0.5


def test_terms_and_weights() -> None:
    config = picture_config(
        reconstruction_weight=10.0, perceptual_weight=0.5, codebook_weight=2.0, disc_start=1, disc_weight=0.1
    )
    total, terms = total_loss(parts(), config, step=0)
    assert total.item() == pytest.approx(20 + 1.5 + 10 + 7 + 1.1)
    assert {name: round(term.item(), 4) for name, term in terms.items()} == {
        "reconstruction": 20.0,
        "perceptual": 1.5,
        "codebook": 10.0,
        "commitment": 7.0,
        "adversarial": 1.1,
    }
    total, terms = total_loss(parts(perceptual=None, adversarial=None), config, step=0)
    assert total.item() == 37.0
    assert "perceptual" not in terms and "adversarial" not in terms


def test_the_public_implementations_losses(golden: Path) -> None:
    """vq_expected.safetensors: codebook and commitment loss of a training forward pass, and what they sum up to."""
    expected = load_file(golden / "vq_expected.safetensors")
    model = load_tokenizer(golden / "vq.pt", golden / "vq_config.json").train()
    output = model(expected["images"])
    reconstruction = reconstruction_loss(output.reconstruction, expected["images"], "l2")
    got = LossParts(reconstruction, None, output.codebook_loss, output.commitment_loss, None)
    total, terms = total_loss(got, picture_config(), step=0)
    assert terms["codebook"].item() == pytest.approx(expected["train.vq_loss"].item(), abs=1e-5)
    assert terms["commitment"].item() == pytest.approx(expected["train.commit_loss"].item(), abs=1e-5)
    wanted = (expected["train.reconstruction"] - expected["images"]).square().mean()
    wanted = wanted + expected["train.vq_loss"] + expected["train.commit_loss"]
    assert total.item() == pytest.approx(wanted.item(), abs=1e-5)
