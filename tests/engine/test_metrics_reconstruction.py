"""Reconstruction figures against hand-made tokenizers with a known loss, and the real one's interface."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.metrics.features import FeatureStore
from retinar.engine.metrics.inception import Inception
from retinar.engine.metrics.reconstruction import Tally, evaluate_reconstruction, fit, reconstruct
from retinar.engine.metrics.ssim import ssim

if find_spec("torchmetrics") is None:
    pytest.skip("the package torchmetrics is missing (pip install 'retinar[metrics]')", allow_module_level=True)
SIZE = 16


class Grey:
    """One code per image quarter: its mean brightness in 16 steps; decodes to that grey."""

    config = SimpleNamespace(image_size=SIZE, codebook_size=16)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        quarters = torch.nn.functional.avg_pool2d(images_BCHW.mean(1, keepdim=True), SIZE // 2)[:, 0]
        return ((quarters + 1) * 7.5).round().long()

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        grey = (codes_Bhw.float() / 7.5 - 1)[:, None].repeat_interleave(SIZE // 2, 2).repeat_interleave(SIZE // 2, 3)
        return grey.repeat(1, 3, 1, 1)


class Perfect:
    """Remembers what it was given; two codes."""

    config = SimpleNamespace(image_size=SIZE, codebook_size=8)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        self.images = images_BCHW
        return torch.tensor([[3, 5]]).expand(len(images_BCHW), 1, 2)

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        return self.images


@pytest.fixture
def store() -> FeatureStore:
    def network(x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1).repeat(1, 43)[:, :2048]

    pytest.importorskip("cleanfid", reason="the package clean-fid is missing (pip install 'retinar[metrics]')")
    return FeatureStore(Inception(network, "stand-in", "0" * 64, True, torch.device("cpu")))


@pytest.fixture
def photographs_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, count in (("healthy", 9), ("npdr", 4)):
        (tmp_path / label).mkdir()
        for index in range(count):
            pixels = np.kron(rng.integers(0, 256, (2, 2, 1), np.uint8), np.ones((8, 8, 3), np.uint8))
            pixels[0, 0, 2] ^= 1  # in colour
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
    return tmp_path


def test_a_perfect_tokenizer_loses_nothing(photographs_folder: Path, store: FeatureStore) -> None:
    found = evaluate_reconstruction(photographs_folder, Perfect(), store, modes=("clean", "legacy"), batch_size=4)
    assert [(each.label, each.images) for each in found] == [("healthy", 9), ("npdr", 4), ("all", 13)]
    for each in found:
        assert (each.l1, each.codes_used, each.codebook_size) == (0.0, 2, 8)
        assert each.psnr == pytest.approx(100) and each.perplexity == pytest.approx(2)
        assert each.ssim == pytest.approx(1) and each.lpips is None
        assert set(each.rfid) == {"clean", "legacy"} and max(each.rfid.values()) < 1e-6


def test_a_coarse_tokenizer_loses_what_arithmetic_says(photographs_folder: Path, store: FeatureStore) -> None:
    found = {each.label: each for each in evaluate_reconstruction(photographs_folder, Grey(), store)}
    errors, codes = [], []
    for path in sorted(photographs_folder.rglob("*.png")):
        pixels = np.asarray(Image.open(path), np.float64)[::8, ::8, 0]
        code = np.round(pixels / 17)
        errors.append(pixels - code * 17)
        codes += code.ravel().tolist()
    psnr = np.mean([10 * np.log10(255**2 / max(np.mean(error**2), 6.5e-6)) for error in errors])
    assert found["all"].psnr == pytest.approx(psnr, abs=0.3)  # 8-bit rounding of what is decoded
    assert found["all"].l1 == pytest.approx(np.mean(np.abs(errors)) / 255, abs=0.002)
    assert found["all"].codes_used == len(set(codes))
    assert found["healthy"].rfid["clean"] > 0
    assert found["healthy"].images + found["npdr"].images == found["all"].images
    assert found["all"].codes_used >= found["healthy"].codes_used


def test_without_a_store_there_is_no_rfid(photographs_folder: Path) -> None:
    found = evaluate_reconstruction(photographs_folder / "npdr", Grey())
    assert [(each.label, each.rfid) for each in found] == [("all", {})]


def test_bad_files_and_other_sizes(photographs_folder: Path) -> None:
    (photographs_folder / "npdr" / "bad.png").write_bytes(b"x")
    Image.new("RGB", (40, 25), (1, 2, 3)).save(photographs_folder / "npdr" / "wide.png")
    Image.new("L", (16, 16)).save(photographs_folder / "npdr" / "grey.png")
    Image.new("RGB", (7, 7), (1, 2, 3)).save(photographs_folder / "npdr" / "small.png")
    assert evaluate_reconstruction(photographs_folder / "npdr", Grey())[0].images == 5
    for path in (photographs_folder / "healthy").glob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match="at least 2 readable"):
        evaluate_reconstruction(photographs_folder / "healthy", Grey())


def test_fit_takes_the_centred_square() -> None:
    pixels = np.zeros((20, 50, 3), np.uint8)
    pixels[:, 15:35] = 200
    assert fit(pixels, 10).shape == (10, 10, 3) and fit(pixels, 10).min() == 200
    same = np.zeros((10, 10, 3), np.uint8)
    assert fit(same, 10) is same


def test_tallies_add_up() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    one, other = Tally.empty(4), Tally.empty(4)
    one.add(black, white, np.array([[0, 0]]))
    other.add(black, black, np.array([[1, 3]]))
    both = (one + other).result("all", {})
    assert (both.images, both.l1, both.psnr, both.codes_used) == (2, 0.5, 50.0, 3)
    assert both.perplexity == pytest.approx(np.exp(0.5 * np.log(2) + 0.5 * np.log(4)))
    assert both.ssim is None and both.lpips is None  # smaller than its window, and not asked for
    assert both.intervals["psnr"] == pytest.approx((50 - 1.96 * 50, 50 + 1.96 * 50), rel=1e-3)


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, section III.B, one window after another; Gaussian weights from the formula."""
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a, b = (each[top : top + 11, left : left + 11, channel].astype(float) for each in (x, y))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                both = (weights * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                index = (2 * mean_a * mean_b + c1) * (2 * both + c2)
                values.append(index / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(11, 11), (24, 17), (31, 40)])
def test_ssim_equals_the_papers_formula(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(shape[0]), np.arange(shape[1]))[..., None] * [3, 2, 1]
    x = (smooth + rng.integers(0, 30, (*shape, 3))).clip(0, 255).astype(np.uint8)
    for y in (255 - x, rng.integers(0, 256, x.shape, np.uint8), x // 2, np.roll(x, 2, axis=1)):
        assert ssim(x, y) == pytest.approx(by_definition(x, y), abs=1e-4)
        assert ssim(y, x) == pytest.approx(ssim(x, y), abs=1e-6)
    assert ssim(x, x) == pytest.approx(1, abs=1e-6)
    assert ssim(x[:10], x[:10]) is None


def test_intervals_of_pixels_and_of_rfid(photographs_folder: Path, store: FeatureStore) -> None:
    found = evaluate_reconstruction(photographs_folder, Grey(), store, bootstrap=10)
    for each in found:
        assert set(each.intervals) == {"l1", "psnr", "ssim", "rfid clean"}
        for name, (low, high) in each.intervals.items():
            value = each.rfid["clean"] if name == "rfid clean" else getattr(each, name)
            assert low < value < high
    assert set(evaluate_reconstruction(photographs_folder, Grey(), store)[0].intervals) == {"l1", "psnr", "ssim"}
    narrow, wide = found[2].intervals["psnr"], found[1].intervals["psnr"]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_lpips_is_the_mean_of_the_networks_distances(photographs_folder: Path, vgg_weights: Path) -> None:
    from retinar.engine.perceptual import LPIPS

    if find_spec("lpips") is None:
        pytest.skip("the package lpips is missing (pip install 'retinar[metrics]')")
    lpips = LPIPS(vgg_weights)
    folder = photographs_folder / "npdr"
    (found,) = evaluate_reconstruction(folder, Grey(), lpips=lpips, batch_size=3)
    expected = []
    for path in sorted(folder.iterdir()):
        pixels = np.asarray(Image.open(path))
        decoded, _ = reconstruct(Grey(), pixels[None])
        pair = (torch.tensor(each).permute(2, 0, 1)[None].float() / 127.5 - 1 for each in (pixels, decoded[0]))
        with torch.no_grad():
            expected.append(float(lpips.distances(*pair)))
    assert found.lpips == pytest.approx(np.mean(expected), rel=1e-4) and "lpips" in found.intervals
    perfect = evaluate_reconstruction(folder, Perfect(), lpips=lpips)[0].lpips
    assert perfect == pytest.approx(0, abs=1e-6) and found.lpips > 0.001


def test_the_real_tokenizers_interface() -> None:
    from retinar.engine.config import TokenizerConfig
    from retinar.engine.tokenizer import VQTokenizer

    torch.manual_seed(0)
    config = TokenizerConfig(
        ch=32, ch_mult=(1, 1), z_channels=32, codebook_size=64, image_size=SIZE, num_res_blocks=1, attention=False
    )
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    decoded, codes = reconstruct(VQTokenizer(config).eval(), images)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    assert codes.shape == (3, 8, 8) and codes.max() < 64
