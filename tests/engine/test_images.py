"""Bytes of images: the rounding, PNG with its text, npz, the sheet, and provenance there and back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinar.engine import images, provenance
from retinar.engine.errors import InputError
from retinar.engine.request import SamplingParams, make_request

ORIGIN = provenance.Origin("ab" * 32, "cd" * 32, "float32", {"runner": "eager", "threads": 1}, ("healthy", "npdr"), 512)
REQUEST = make_request(17, 1, SamplingParams(cfg_scale=1.5, top_k=40, top_p=0.9), seed=2**64 - 1)


def made(seed: int = 0) -> tuple[Image.Image, torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    pixels_HWC = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    codes_T = torch.from_numpy(rng.integers(0, 512, 36))
    image = images.to_pil(pixels_HWC, provenance.describe(ORIGIN, REQUEST, codes_T, pixels_HWC))
    return image, codes_T, pixels_HWC


def test_to_bytes_is_upstreams_rule() -> None:
    values = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 0.9999, 1.0, 9.0])
    pixels_HWC = images.to_bytes(values.view(1, 1, -1).expand(3, 1, -1))
    assert pixels_HWC.shape == (1, 8, 3) and pixels_HWC.dtype == np.uint8
    # 127.5 x + 128, clamped, and the fraction dropped
    assert pixels_HWC[0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255, 255]


def test_channels_and_rows_keep_their_place() -> None:
    image_CHW = torch.full((3, 2, 3), -1.0)
    image_CHW[2, 1, 0] = 1.0
    pixels_HWC = images.to_bytes(image_CHW)
    assert pixels_HWC[1, 0].tolist() == [0, 0, 255] and int(pixels_HWC.sum()) == 255


def test_a_batch_is_its_images() -> None:
    images_BCHW = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    pixels_BHWC = images.to_bytes(images_BCHW)
    assert pixels_BHWC.shape == (5, 4, 6, 3) and pixels_BHWC.flags.c_contiguous
    for pixels_HWC, image_CHW in zip(pixels_BHWC, images_BCHW, strict=True):
        assert np.array_equal(pixels_HWC, images.to_bytes(image_CHW))


def test_provenance_there_and_back(tmp_path: Path) -> None:
    image, codes_T, pixels_HWC = made()
    images.save_png(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        text = dict(opened.info)
    assert set(provenance.FIELDS) <= set(text)
    assert text["software"] == "retinar" and text["synthetic"] == "true" and text["label"] == "npdr"
    assert text["index"] == "17" and text["seed"] == str(2**64 - 1)

    found = provenance.read(tmp_path / "a.png")
    assert found.request == REQUEST and found.untouched and found.implementation == ORIGIN.implementation
    assert np.array_equal(found.pixels_HWC, pixels_HWC)
    assert torch.equal(provenance.unpack_codes(found.fields["codes"], 512), codes_T)
    assert found.fields["codes_sha256"] == hashlib.sha256(codes_T.numpy().astype("<u2").tobytes()).hexdigest()
    assert found.fields["pixels_sha256"] == hashlib.sha256(pixels_HWC.tobytes()).hexdigest()
    wanted = provenance.expected(ORIGIN, REQUEST)
    assert wanted.items() <= found.fields.items() and "implementation" not in wanted


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**17 - 1), max_size=50), st.booleans())
def test_codes_pack_and_unpack(codes: list[int], wide: bool) -> None:
    vocab_size = 1 << 17 if wide else 1 << 16
    codes_T = torch.tensor([code % vocab_size for code in codes], dtype=torch.int64)
    image = images.to_pil(np.zeros((1, 1, 3), np.uint8), {})
    origin = provenance.Origin("", "", "float32", {}, (), vocab_size)
    fields = provenance.describe(origin, REQUEST, codes_T, np.asarray(image))
    assert torch.equal(provenance.unpack_codes(fields["codes"], vocab_size), codes_T)


def test_labels_beyond_latin_survive(tmp_path: Path) -> None:
    image, _, _ = made()
    image.info["label"] = "gesund 健康"
    images.save_png(image, tmp_path / "a.png")
    assert provenance.read(tmp_path / "a.png").fields["label"] == "gesund 健康"


def test_png_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        images.save_png(made()[0], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_changed_pixels_are_noticed(tmp_path: Path) -> None:
    image, _, _ = made()
    image.putpixel((3, 3), (1, 2, 3))
    images.save_png(image, tmp_path / "a.png")
    assert not provenance.read(tmp_path / "a.png").untouched


@pytest.mark.parametrize("keep", [0, 7, 60, -20])
def test_a_cut_file_is_a_sentence(tmp_path: Path, keep: int) -> None:
    images.save_png(made()[0], tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"whole PNG made by retinar.*a\.png"):
        provenance.read(tmp_path / "a.png")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "a.png"
    images.save_png(made()[0], path)
    damaged = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="cannot be read"):
        provenance.read(path)


def test_a_stranger_and_nothing_are_sentences(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    with pytest.raises(InputError, match=r"other\.png carries no software"):
        provenance.read(tmp_path / "other.png")
    with pytest.raises(InputError, match="found nothing at"):
        provenance.read(tmp_path / "missing.png")


def test_damaged_text_is_a_sentence(tmp_path: Path) -> None:
    for name, value in (("parameters", "{"), ("parameters", '{"cfg_scale": -1}'), ("index", "x"), ("seed", "-1")):
        image, _, _ = made()
        image.info[name] = value
        images.save_png(image, tmp_path / "a.png")
        with pytest.raises(InputError, match="is damaged"):
            provenance.read(tmp_path / "a.png")


def test_npz_is_upstreams(tmp_path: Path) -> None:
    pixels_NHWC = np.stack([made(seed)[2] for seed in range(5)])
    for name in ("a.npz", "b.npz"):
        images.save_npz(tmp_path / name, iter(pixels_NHWC), 5, 12, 12)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pixels_NHWC)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("counts", [[1], [2], [9], [65], [200, 3], [1, 1, 1], [12] * 40, []])
def test_sheet_at_any_count(counts: list[int]) -> None:
    image = Image.new("RGB", (256, 256), (200, 60, 20))
    groups = [(f"class {i}", count, [image] * count) for i, count in enumerate(counts)]
    sheet = images.sheet(groups, "synthetic · a footer that is quite long, longer than one image is wide")
    pixels = np.asarray(sheet)
    drawn = int((pixels == (200, 60, 20)).all(-1).sum())
    shown = sum(min(count, images.sheet_limit(len(counts))) for count in counts[: images.SHEET_GROUPS])
    assert drawn == shown * images.SHEET_CELL**2
    assert sheet.width <= 48 + 8 * 198 and (pixels[:, :8] == images.BACKGROUND).all()


def test_small_images_are_not_blown_up() -> None:
    image = Image.new("RGB", (64, 64), (200, 60, 20))
    pixels = np.asarray(images.sheet([("healthy", 4, [image] * 4)]))
    assert int((pixels == (200, 60, 20)).all(-1).sum()) == 4 * 64 * 64
