"""``extract_codes_c2i``: upstream's files from class folders of any count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retinar.engine.checkpoint import save_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.tokenizer import VQTokenizer
from retinar.engine.torchvision_shim import import_torchvision
from retinar.train.code_files import CodeSet
from retinar.train.crops import to_tensor
from retinar.train.data.manifest import MANIFEST
from retinar.train.encoding import Encoding
from retinar.train.upstream import extract_codes_c2i
from retinar.train.upstream.image_folder import ImageFolder
from retinar.train.views import Views
from tests.train.upstream_world import GRID, SIZE, TOKENIZER, write_photographs, write_tokenizer


class Places:
    def __init__(self, root: Path) -> None:
        self.data, self.file = write_photographs(root / "data"), root / "vq.pt"
        self.model = write_tokenizer(self.file)

    def flags(self, code_path: Path, *more: str) -> list[str]:
        return [
            *("--data-path", str(self.data), "--code-path", str(code_path), "--vq-ckpt", str(self.file)),
            *("--vq-model", "VQ-8", "--image-size", str(SIZE), *more),
        ]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("extract"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_photographs_are_numbered_as_torchvision_does(places: Places) -> None:
    folder = ImageFolder(places.data)
    names = [path.relative_to(places.data).as_posix() for path in folder.paths]
    assert names == ["B/x.PNG", "a/1.png", "a/2.jpg", "a/deep/0.png", "a/deep/9.bmp", "c/0.png", "c/1.png"]
    assert folder.classes == ("B", "a", "c") and folder.labels.tolist() == [0, 1, 1, 1, 1, 2, 2]
    try:
        import_torchvision()
        from torchvision import datasets
    except ImportError:
        return
    theirs = datasets.ImageFolder(str(places.data))
    assert [(str(path), int(label)) for path, label in zip(folder.paths, folder.labels, strict=True)] == theirs.samples
    assert np.array_equal(folder.load(4), np.asarray(theirs[4][0]))


@pytest.mark.parametrize("ten_crop", [False, True])
def test_files_are_upstreams(ten_crop: bool, places: Places, tmp_path: Path) -> None:
    more = ("--ten-crop", "--crop-range", "1.3", "--dataset", "fundus") if ten_crop else ("--debug",)
    assert extract_codes_c2i.main(places.flags(tmp_path, *more)) == 0
    stem = f"{'fundus' if ten_crop else 'imagenet'}{SIZE}"
    views = Views("ten-crop" if ten_crop else "mirror", SIZE, 1.3)
    folder = ImageFolder(places.data)
    for i in range(7):
        codes, label = np.load(tmp_path / f"{stem}_codes/{i}.npy"), np.load(tmp_path / f"{stem}_labels/{i}.npy")
        assert codes.dtype == label.dtype == np.int64 and label.tolist() == [folder.labels[i]]
        wanted = places.model.encode(to_tensor(views.of(folder.load(i)))).flatten(1)
        assert codes.shape == (1, len(views.names), GRID * GRID) and np.array_equal(codes[0], wanted.numpy())
    assert len(list((tmp_path / f"{stem}_codes").iterdir())) == 7
    found = CodeSet(tmp_path, stem=stem)
    assert (found.vocab_size, found.meta["classes"], found.meta["names"][3]) == (32, ["B", "a", "c"], "a/deep/0.png")


def test_an_interrupted_call_goes_on_and_another_is_refused(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = places.flags(tmp_path / "codes")
    assert extract_codes_c2i.main(places.flags(tmp_path / "whole")) == 0
    original, left = Encoding._write, [3]

    def write(self: Encoding, first: int, codes: np.ndarray) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(self, first, codes)

    monkeypatch.setattr(Encoding, "_write", write)
    assert extract_codes_c2i.main(flags) == 130
    assert sorted(path.name for path in (tmp_path / "codes" / f"imagenet{SIZE}_codes").iterdir()) == [
        "0.npy",
        "1.npy",
        "2.npy",
    ]
    left[0] = 4
    assert extract_codes_c2i.main(flags) == 0 and left[0] == 0
    assert files(tmp_path / "codes") == files(tmp_path / "whole")
    assert extract_codes_c2i.main(flags) == 0  # nothing is left to do
    capsys.readouterr()
    assert extract_codes_c2i.main([*flags, "--ten-crop"]) == 2
    assert "another crop_range, view" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_folder_of_ours_is_a_tokenizer(places: Places, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "vq", places.model)
    flags = places.flags(tmp_path / "codes")
    flags[flags.index(str(places.file))] = str(tmp_path / "vq")
    assert extract_codes_c2i.main([*flags, "--codebook-size", "32"]) == 0
    assert CodeSet(tmp_path / "codes").meta["tokenizer_config"] == TOKENIZER.to_dict()


REFUSED = {
    ("--image-size", "33"): "--image-size as a multiple of 8",
    ("--image-size", "0"): "no number of pixels",
    ("--vq-model", "VQ-16"): "add --vq-model VQ-8",
    ("--codebook-size", "16384"): "leave out --codebook-size",
    ("--codebook-embed-dim", "4"): "leave out --codebook-embed-dim",
    ("--dataset", "coco"): "sort the photographs by class",
    ("--dataset", "a/b"): "choose another name",
    ("--crop-range", "0.5", "--ten-crop"): "crop range from 1",
    ("--vq-ckpt", "nothing.pt"): "nothing.pt",
    ("--data-path", "nowhere"): "--data-path nowhere",
    ("--ten-crops",): "did you mean --ten-crop?",
}


@pytest.mark.parametrize("change", REFUSED, ids=" ".join)
def test_what_cannot_be_met_is_one_sentence(
    change: tuple[str, ...], places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract_codes_c2i.main(places.flags(tmp_path / "codes", *change)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and REFUSED[change] in said, said
    assert not (tmp_path / "codes").exists()


def test_debug_is_one_process(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert extract_codes_c2i.main(places.flags(tmp_path, "--debug")) == 2
    assert "leave out --debug or torchrun" in capsys.readouterr().err


def test_folders_without_classes_are_refused(places: Places, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder for each class"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"found none in .*empty"):
        ImageFolder(tmp_path)
    (tmp_path / MANIFEST).write_text("")
    with pytest.raises(InputError, match=r"give .*train"):
        ImageFolder(tmp_path)


def test_a_codebook_of_another_tokenizer(places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same flags with other weights: the codes there are not gone on with."""
    assert extract_codes_c2i.main(places.flags(tmp_path / "codes")) == 0
    torch.manual_seed(5)
    save_tokenizer(tmp_path / "other", VQTokenizer(TOKENIZER))
    assert extract_codes_c2i.main(places.flags(tmp_path / "codes", "--vq-ckpt", str(tmp_path / "other"))) == 2
    assert "another tokenizer_digest" in capsys.readouterr().err
