"""Codes on disk: both layouts, encoding that can be stopped anywhere, and everything that a damaged folder can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retinar.engine.checkpoint import digest, load_tokenizer, save_tokenizer
from retinar.engine.errors import InputError
from retinar.engine.progress import silent
from retinar.engine.tokenizer import VQTokenizer
from retinar.train import code_writer
from retinar.train.code_files import CodeSet, CodeWriter, Layout
from retinar.train.code_layout import META, meta_file, note_file
from retinar.train.code_writer import Blocks
from retinar.train.codes import encode_folder
from retinar.train.crops import to_tensor
from retinar.train.data.images import ImageSet
from retinar.train.encoding import Encoding, encode_pixels
from tests.train.pictures import MODEL, SIZE, write_pictures

GRID = 8


class Stopped(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"), train=4, valid=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vq") / "model"
    torch.manual_seed(0)
    save_tokenizer(folder, VQTokenizer(MODEL))
    return folder


@pytest.fixture(scope="module")
def packed(data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    out = tmp_path_factory.mktemp("codes") / "train"
    encode_folder(data, tokenizer, out, progress=silent)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- encoding


def test_image_and_mirror(data: Path, tokenizer: Path, packed: Path) -> None:
    code_set, images = CodeSet(packed), ImageSet(data, "train")
    model = load_tokenizer(tokenizer)
    assert code_set.codes.shape == (8, 2, GRID * GRID) and code_set.codes.dtype == np.uint16
    assert len(np.unique(code_set.codes)) > 4
    assert code_set.labels.tolist() == [0] * 4 + [1] * 4 == images.labels.tolist()
    pixels = images.load(5)
    for view, turned in enumerate((pixels, pixels[:, ::-1])):
        wanted = model.encode(to_tensor(np.ascontiguousarray(turned[None]))).flatten()
        assert torch.equal(torch.from_numpy(code_set.codes[5, view].astype(np.int64)), wanted)
    meta = code_set.meta
    assert (meta["classes"], meta["grid"], meta["views"], meta["split"]) == (["healthy", "npdr"], GRID, 2, "train")
    assert meta["tokenizer_digest"] == digest(tokenizer)
    assert meta["tokenizer_config"] == MODEL.to_dict()
    assert meta["names"][5] == "train/npdr/npdr1.png"


@pytest.mark.parametrize("layout", ["packed", "upstream"])
@pytest.mark.parametrize("block", [1, 3])
def test_cut_and_stopped_anywhere_the_files_are_the_same(
    block: int, layout: Layout, data: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of other sizes, and a stop in the middle of every one of them."""
    encode_folder(data, tokenizer, tmp_path / "whole", layout=layout, progress=silent)
    monkeypatch.setattr(code_writer, "BLOCKS", 1)
    monkeypatch.setattr(code_writer, "BLOCK", block)
    original, stops = code_writer._put, [0]

    def stop_before_writing(path: Path, content: bytes) -> None:
        stops[0] += 1
        if stops[0] % 7 == 2:
            path.with_name(f".{path.name}.1.partial").write_bytes(content[: len(content) // 2])
            raise Stopped
        original(path, content)

    monkeypatch.setattr(code_writer, "_put", stop_before_writing)
    out = tmp_path / "stopped"
    for _ in range(30):
        try:
            encode_folder(data, tokenizer, out, layout=layout, progress=silent)
            break
        except Stopped:
            with pytest.raises(InputError, match="encoding under way"):
                CodeSet(out)
        monkeypatch.setattr(code_writer, "BLOCK", 5)  # a folder keeps the size that it was begun with
    else:
        pytest.fail("it never ended")
    assert stops[0] > 2
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("layout", "name"), [("packed", ".encoding/000000002"), ("upstream", f"fundus{SIZE}_codes/3.npy")]
)
def test_what_a_power_cut_emptied_is_made_again(
    layout: Layout, name: str, data: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    def note(self: Blocks, first: int, *rest: Any) -> None:
        made.append(first)
        original(self, first, *rest)

    made: list[int] = []
    original = Blocks.write
    monkeypatch.setattr(code_writer, "BLOCKS", 4)  # of two images each
    encode_folder(data, tokenizer, tmp_path / "whole", layout=layout, progress=silent)
    with monkeypatch.context() as patch:
        patch.setattr(CodeWriter, "finish", stop)
        with pytest.raises(Stopped):
            encode_folder(data, tokenizer, tmp_path / "out", layout=layout, progress=silent)
    (tmp_path / "out" / name).write_bytes(b"")
    monkeypatch.setattr(Blocks, "write", note)
    encode_folder(data, tokenizer, tmp_path / "out", layout=layout, progress=silent)
    assert made == [2]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_both_layouts_hold_the_same(data: Path, tokenizer: Path, packed: Path, tmp_path: Path) -> None:
    encode_folder(data, tokenizer, tmp_path / "up", layout="upstream", dataset="ddr", progress=silent)
    first = np.load(tmp_path / "up" / f"ddr{SIZE}_codes" / "0.npy")
    assert first.shape == (1, 2, GRID * GRID) and first.dtype == np.int64
    assert np.load(tmp_path / "up" / f"ddr{SIZE}_labels" / "7.npy").tolist() == [1]
    ours, theirs = CodeSet(packed), CodeSet(tmp_path / "up")
    assert np.array_equal(ours.codes, theirs.codes) and np.array_equal(ours.labels, theirs.labels)
    assert theirs.meta["classes"] == ["healthy", "npdr"] and theirs.vocab_size == MODEL.codebook_size
    meta_file(tmp_path / "up", f"ddr{SIZE}").unlink()  # as LlamaGen's own
    bare = CodeSet(tmp_path / "up", vocab_size=32)
    assert (bare.vocab_size, bare.meta["grid"], bare.meta["classes"]) == (32, GRID, ["0", "1"])
    assert CodeSet(tmp_path / "up", num_classes=3).meta["classes"] == ["0", "1", "2"]


def test_a_finished_folder_is_recognised(
    data: Path, tokenizer: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("encoded again")

    before = files(packed)
    monkeypatch.setattr(Encoding, "run", never)
    encode_folder(data, tokenizer, packed, progress=silent)
    assert files(packed) == before


def test_other_contents_are_refused(data: Path, tokenizer: Path, packed: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_tokenizer(tmp_path / "other", VQTokenizer(MODEL))
    with pytest.raises(InputError, match="another tokenizer_digest"):
        encode_folder(data, tmp_path / "other", packed, progress=silent)
    with pytest.raises(InputError, match="another layout"):
        encode_folder(data, tokenizer, packed, layout="upstream", progress=silent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"found thesis\.txt"):
        encode_folder(data, tokenizer, tmp_path / "mine", progress=silent)
    with pytest.raises(InputError, match="found the file"):
        encode_folder(data, tokenizer, tmp_path / "mine" / "thesis.txt", progress=silent)
    theirs = tmp_path / "up" / f"ddr{SIZE}_codes"
    theirs.mkdir(parents=True)
    np.save(theirs / "0.npy", np.zeros((1, 2, GRID * GRID), np.int64))
    with pytest.raises(InputError, match=f"found ddr{SIZE}_codes"):
        encode_folder(data, tokenizer, tmp_path / "up", layout="upstream", dataset="ddr", progress=silent)
    with pytest.raises(InputError, match="split test"):
        encode_folder(data, tokenizer, tmp_path / "none", split="test", progress=silent)
    assert not (tmp_path / "none").exists()
    wrong = write_pictures(tmp_path / "large", train=1, size=2 * SIZE)
    with pytest.raises(InputError, match="64x64"):
        encode_folder(wrong, tokenizer, tmp_path / "none", progress=silent)


def test_several_sizes_of_upstreams_lie_beside_each_other(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    for name in ("ddr", "aptos"):
        encode_folder(data, tokenizer, tmp_path, layout="upstream", dataset=name, progress=silent)
    with pytest.raises(InputError, match="one folder of codes"):
        CodeSet(tmp_path)
    assert CodeSet(tmp_path, stem=f"aptos{SIZE}").meta["stem"] == f"aptos{SIZE}"
    with pytest.raises(InputError, match=f"ddr{SIZE + 1}_codes"):
        CodeSet(tmp_path, stem=f"ddr{SIZE + 1}")


def test_pixels_of_any_number(data: Path, tokenizer: Path) -> None:
    """A photograph's codes do not depend on those beside it."""
    model, images = load_tokenizer(tokenizer), ImageSet(data, "train")
    together = encode_pixels(model, images.load_batch(range(7)))
    alone = np.concatenate([encode_pixels(model, images.load_batch([i])) for i in range(7)])
    assert np.array_equal(together, alone)


def test_the_command(data: Path, tokenizer: Path, packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    from retinar.commands.encode import Encode

    summary = Encode(data, tokenizer=tokenizer, out=tmp_path / "codes").run(silent)
    assert json.loads(json.dumps(summary))["splits"]["valid"]["images"] == 2
    assert files(tmp_path / "codes" / "train") == files(packed)
    assert len(CodeSet(tmp_path / "codes", "valid")) == 2


# --- the format


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data(), layout=st.sampled_from(["packed", "upstream"]))
def test_round_trip(
    draw: st.DataObject, layout: Layout, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any shape, in blocks of any size written in any order, with a new writer before some of them."""
    monkeypatch.setattr(code_writer, "BLOCK", draw.draw(st.integers(1, 8)))
    monkeypatch.setattr(code_writer, "BLOCKS", draw.draw(st.sampled_from([1, 3, 64])))
    images, views, grid = (draw.draw(st.integers(1, most)) for most in (7, 3, 4))
    vocabulary = draw.draw(st.sampled_from([2, 256, 65536]))
    random = np.random.default_rng(draw.draw(st.integers(0, 99)))
    codes = random.integers(0, vocabulary, size=(images, views, grid * grid))
    labels = random.integers(0, 3, size=images)
    identity = {"images": images, "views": views, "grid": grid, "split": "train", "classes": ["a", "b", "c"]}
    path = tmp_path_factory.mktemp("codes") / "out"
    writer = CodeWriter(path, layout, identity, stem="x256")
    while missing := writer.blocks.missing():
        first = draw.draw(st.sampled_from(missing))
        span = slice(writer.blocks.span(first).start, writer.blocks.span(first).stop)
        writer.blocks.write(first, codes[span], labels[span])
        if draw.draw(st.booleans()):
            writer = CodeWriter(path, layout, identity, stem="x256")
        assert writer.blocks.missing() == [other for other in missing if other != first] and not writer.complete
    writer.finish(labels, {"tokenizer_config": {"codebook_size": vocabulary}})
    assert CodeWriter(path, layout, identity, stem="x256").complete
    found = CodeSet(path)
    assert np.array_equal(found.codes, codes) and np.array_equal(found.labels, labels)
    assert len(found) == images and found.vocab_size == vocabulary


def test_packed_codes_are_numpys(tmp_path: Path) -> None:
    codes = np.arange(5 * 2 * 16).reshape(5, 2, 16)
    writer = CodeWriter(tmp_path / "out", "packed", {"images": 5, "views": 2, "grid": 4})
    writer.write(codes, np.zeros(5, np.int64))
    writer.finish(np.zeros(5, np.int64), {})
    np.save(tmp_path / "whole.npy", codes.astype(np.uint16))
    assert (tmp_path / "out" / "codes.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["codes.npy", "labels.npy", "meta.json"]


def edit_meta(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "sha256": {}, **changes}))


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_meta(folder)
        np.save(folder / name, change(np.load(folder / name)))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "found none"),
    "no meta": (lambda folder: (folder / META).unlink(), "found no meta.json"),
    "damaged meta": (lambda folder: (folder / META).write_text("{"), "found something else"),
    "another format": (lambda folder: edit_meta(folder, format=2), "found something else"),
    "no codes": (lambda folder: (folder / "codes.npy").unlink(), "codes.npy"),
    "cut codes": (lambda folder: (folder / "codes.npy").write_bytes(b"\x93NUMPY\x01\x00"), "codes.npy"),
    "no labels": (lambda folder: (folder / "labels.npy").unlink(), "labels.npy"),
    "changed codes": (
        lambda folder: np.save(folder / "codes.npy", np.load(folder / "codes.npy") * 0),
        "other contents",
    ),
    "dtype": (put("codes.npy", lambda codes: codes.astype(np.int64)), "found int64"),
    "no views": (put("codes.npy", lambda codes: codes[:, 0]), r"found uint16 \[8, 64\]"),
    "grid": (put("codes.npy", lambda codes: codes[:, :, 1:]), r"\[images, views, 64\]"),
    "no images": (put("codes.npy", lambda codes: codes[:0]), r"found uint16 \[0, 2, 64\]"),
    "vocabulary": (put("codes.npy", lambda codes: codes + np.uint16(32)), "codes below 32"),
    "fewer labels": (put("labels.npy", lambda labels: labels[1:]), r"labels of int64 \[8\]"),
    "unknown label": (put("labels.npy", lambda labels: labels + 1), "labels from 0 to 1"),
    "negative label": (put("labels.npy", lambda labels: labels - 1), "labels from 0 to 1"),
    "pickled": (lambda folder: np.save(folder / "codes.npy", np.array([None]), allow_pickle=True), "codes.npy"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence(name: str, packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    shutil.copytree(packed, folder)
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(InputError, match=words) as caught:
        CodeSet(folder)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_folder_above_is_pointed_down(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "train")
    with pytest.raises(InputError, match=r"did you mean .*train"):
        CodeSet(tmp_path)
    assert len(CodeSet(tmp_path, "train")) == 8


def test_damaged_upstream_folders(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    encode_folder(data, tokenizer, whole, layout="upstream", progress=silent)
    for name, damage, words in (
        ("labels", lambda codes, labels: shutil.rmtree(labels), "found none"),
        ("empty", lambda codes, labels: [file.unlink() for file in codes.iterdir()], "0.npy"),
        ("one label", lambda codes, labels: (labels / "3.npy").unlink(), "3.npy"),
        ("shape", lambda codes, labels: np.save(codes / "3.npy", np.zeros((1, 1, 64), int)), "3.npy"),
        ("float", lambda codes, labels: np.save(codes / "3.npy", np.zeros((1, 2, 64))), "float64"),
        ("large", lambda codes, labels: np.save(codes / "3.npy", np.full((1, 2, 64), 1 << 16)), "65536"),
    ):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        damage(folder / f"fundus{SIZE}_codes", folder / f"fundus{SIZE}_labels")
        with pytest.raises(InputError, match=words):
            CodeSet(folder)


def test_a_damaged_note_is_refused(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    note_file(tmp_path / "out", None).write_text("[")
    with pytest.raises(InputError, match="damaged"):
        encode_folder(data, tokenizer, tmp_path / "out", progress=silent)
