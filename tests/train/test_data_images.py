"""ImageSet: order, classes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.train.data.images import ImageSet
from retinar.train.data.phantoms import write_phantoms
from retinar.train.data.prepare import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_phantoms(
        root / "src", {"train": {"healthy": 3, "npdr": 2}, "test": {"healthy": 1, "npdr": 1}}, size=48, progress=silent
    )
    prepare(root / "src", root / "out", size=32, workers=1, progress=silent)
    return root / "out"


def plain(root: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), "red").save(root / name)
    return root


def test_a_prepared_folder(folder: Path) -> None:
    images = ImageSet(folder, "train", size=32)
    assert len(images) == 5 and images.classes == ("healthy", "npdr")
    assert images.labels.tolist() == [0, 0, 0, 1, 1] and images.labels.dtype == np.int64
    assert images.paths == sorted(images.paths)
    batch = images.load_batch([4, 0])
    assert batch.shape == (2, 32, 32, 3) and batch.dtype == np.uint8
    assert (batch[1] == images.load(0)).all() and (batch[0] == np.asarray(Image.open(images.paths[4]))).all()
    assert len(ImageSet(folder, None)) == 7
    reversed_classes = ImageSet(folder, "train", classes=("npdr", "healthy"))
    assert reversed_classes.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(ImageSet(folder, "train", classes=("npdr",))) == 2


def test_plain_folders_read_alike_with_and_without_a_split(tmp_path: Path, folder: Path) -> None:
    plain(tmp_path, {"train/b/2.png": 8, "train/b/1.png": 8, "train/a/3.png": 8})
    (tmp_path / "train" / "b" / "notes.txt").touch()
    for images in (ImageSet(tmp_path, "train"), ImageSet(tmp_path / "train", None)):
        assert [p.name for p in images.paths] == ["3.png", "1.png", "2.png"]
        assert images.classes == ("a", "b")
    # A prepared folder without its manifest is a plain folder: the same photographs in the same order.
    assert [p.name for p in ImageSet(folder / "train", None).paths] == [p.name for p in ImageSet(folder).paths]


def test_what_is_refused(tmp_path: Path, folder: Path) -> None:
    plain(tmp_path, {"train/a/1.png": 8, "train/a/2.png": 9})
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "none" / "train").mkdir(parents=True)
    for arguments, words in (
        ((folder, "dev"), "a split dev .* found test, train"),
        ((tmp_path, "test"), "a split test .* found none, train"),
        ((tmp_path, "train"), "class empty .*2 a"),
        ((tmp_path / "none", "train"), "one folder per class"),
        ((tmp_path / "absent", "train"), "not one"),
        ((folder, "train", ("healthy", "amd")), "class amd .* found 3 healthy, 2 npdr"),
        ((folder, "train", None, 64), r"64x64 pixels .* got 32x32: run retinar prepare with --size 64"),
    ):
        with pytest.raises(InputError, match=words):
            ImageSet(*arguments)
    uneven = ImageSet(tmp_path, "train", classes=("a",))
    with pytest.raises(InputError, match="one size"):
        uneven.load_batch([0, 1])
    uneven.paths[0].write_bytes(b"x")
    with pytest.raises(InputError, match="not an image"):
        uneven.load(0)


def test_a_manifest_that_promises_more_than_there_is(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "src", {"train": {"healthy": 2, "npdr": 1}}, size=48, progress=silent)
    prepare(tmp_path / "src", tmp_path / "out", size=32, workers=1, progress=silent)
    images = ImageSet(tmp_path / "out")
    images.paths[0].unlink()
    with pytest.raises(InputError, match="vanished"):
        images.load(0)
    with pytest.raises(InputError, match=r"1 photographs of the manifest .* are missing"):
        ImageSet(tmp_path / "out")
