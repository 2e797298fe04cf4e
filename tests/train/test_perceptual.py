"""LPIPS as a distance and as a loss: the ``lpips`` package's own value, and what a training needs beyond it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retinar.engine.errors import InputError
from retinar.engine.perceptual import LPIPS, find_vgg16, read_vgg16
from retinar.train.perceptual import PerceptualLoss

if importlib.util.find_spec("lpips") is None:
    pytest.skip("the package lpips is not installed (extra: metrics)", allow_module_level=True)

WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VGG16 of the right shapes, He-initialised so that all layers stay alive."""
    noise = torch.Generator().manual_seed(0)
    tensors, width_in = {}, 3
    for number, width in WIDTHS.items():
        scale = (2.0 / (9 * width_in)) ** 0.5
        tensors[f"features.{number}.weight"] = (scale * torch.randn(width, width_in, 3, 3, generator=noise)).to(
            torch.float16
        )
        tensors[f"features.{number}.bias"] = (0.1 * torch.randn(width, generator=noise)).to(torch.float16)
        width_in = width
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def loss(weights: Path) -> Iterator[PerceptualLoss]:
    yield PerceptualLoss(weights)


def images(count: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_is_lpips(loss: PerceptualLoss) -> None:
    """Built by the package itself, with the same trunk."""
    import lpips

    a, b = images(seed=1), images(seed=2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        theirs.net.load_state_dict(loss.network.net.state_dict())
        wanted = theirs(a, b).mean()
        assert loss(a, b).item() == pytest.approx(wanted.item(), rel=1e-5)
        assert loss(a, a).item() == 0.0


def test_a_distance_an_image(weights: Path, loss: PerceptualLoss) -> None:
    """Each image's own, whatever stands beside it; features that are kept give the same."""
    lpips = LPIPS(weights)
    a, b = images(3, seed=1), images(3, seed=2)
    with torch.no_grad():
        distances = lpips(a, b)
        assert distances.shape == (3,) and distances.dtype == torch.float32
        assert distances.mean().item() == pytest.approx(loss(a, b).item(), rel=1e-6)
        for index in range(3):
            alone = lpips.distances(a[index : index + 1], b[index : index + 1])
            assert alone.item() == pytest.approx(distances[index].item(), rel=1e-5)
        against_all = lpips.between(lpips.features(a[:1]), lpips.features(b))
        wanted = torch.stack([lpips.distances(a[:1], b[index : index + 1])[0] for index in range(3)])
        torch.testing.assert_close(against_all, wanted, rtol=1e-5, atol=1e-7)


def test_weights_are_found_where_torchvision_keeps_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_vgg16() is None
    assert find_vgg16(weights) == weights
    kept = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    kept.parent.mkdir(parents=True)
    torch.save(read_vgg16(weights), kept)
    assert find_vgg16() == kept
    with pytest.raises(InputError, match="found no file: check --vgg"):
        find_vgg16(tmp_path / "absent.pth")


def test_gradient_for_the_reconstruction_alone(loss: PerceptualLoss) -> None:
    made, wanted = images(seed=1).requires_grad_(), images(seed=2).requires_grad_()
    loss(made, wanted).backward()
    assert made.grad is not None and made.grad.abs().max() > 0
    assert wanted.grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_black_pictures_have_a_finite_gradient(weights: Path) -> None:
    """Where no filter fires the norm is 0, whose root has no gradient: lpips itself gives NaN."""
    dead = PerceptualLoss(weights)
    with torch.no_grad():
        for name, parameter in dead.network.net.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-10.0)
    made = images().requires_grad_()
    dead(made, images(seed=1)).backward()
    assert made.grad is not None and made.grad.isfinite().all()


def test_it_never_trains(loss: PerceptualLoss) -> None:
    loss.train()
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert len(loss.digest) == 64


def test_bf16_is_near(weights: Path, loss: PerceptualLoss) -> None:
    a, b = images(seed=1), images(seed=2)
    mixed = PerceptualLoss(weights, dtype=torch.bfloat16)
    with torch.no_grad():
        assert mixed(a, b).dtype == torch.float32
        assert mixed(a, b).item() == pytest.approx(loss(a, b).item(), rel=0.03)


def test_making_it_is_silent_and_draws_nothing(weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PerceptualLoss(weights)
    assert torch.equal(torch.rand(4), wanted)
    assert capfd.readouterr() == ("", "")


def test_torchvisions_file_is_read_too(weights: Path, tmp_path: Path) -> None:
    """Its classifier is left out; what is stored in fp16 comes out in fp32."""
    held = read_vgg16(weights)
    assert len(held) == 26 and all(tensor.dtype == torch.float32 for tensor in held.values())
    torch.save({**held, "classifier.0.weight": torch.zeros(3)}, tmp_path / "vgg16.pth")
    again = read_vgg16(tmp_path / "vgg16.pth")
    assert again.keys() == held.keys() and all(torch.equal(again[name], held[name]) for name in held)


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"perceptual_weights=PATH.*perceptual=none"):
        PerceptualLoss(None)
    with pytest.raises(InputError, match="found no file"):
        read_vgg16(tmp_path / "absent.safetensors")
    for name in ("noise.safetensors", "noise.pth"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(InputError, match="damaged or another file"):
            read_vgg16(tmp_path / name)
    save_file({"features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"features\.0\.weight \[64, 3, 3, 3\].*found shape \[64, 3, 5, 5\]"):
        read_vgg16(tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="found nothing"):
        read_vgg16(tmp_path / "list.pth")


def test_real_weights_see_structure(vgg_weights: Path) -> None:
    """A smooth shift in brightness is nearer to the picture than noise of the same mean squared error."""
    real = PerceptualLoss(vgg_weights)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    picture = torch.stack([torch.sin(6 * x), torch.cos(5 * y), x * y])[None] * 0.5
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        shifted, noisy = real(picture + 0.1, picture), real(picture + noise, picture)
    assert 0 < 3 * shifted.item() < noisy.item()
