"""Checkpoints, configs and images that are damaged, edited or crafted: one sentence, and no image of another model."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from retinar.engine import checkpoint, provenance
from retinar.engine.checkpoint import load_gpt, load_tokenizer, save_gpt
from retinar.engine.config import GPTConfig, TokenizerConfig, gpt_config, tokenizer_config
from retinar.engine.convert import convert
from retinar.engine.errors import InputError
from retinar.engine.generate import generate_folder
from retinar.engine.model import GPT
from retinar.engine.progress import silent
from retinar.engine.reproduce import reproduce
from retinar.engine.request import SamplingParams, resolve_label
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer

CLASSES = ("healthy", "npdr")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def weights(golden: Path) -> dict[str, Tensor]:
    return torch.load(golden / "gpt_consolidated.pth", weights_only=True)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    value = json.loads(file.read_text())
    value["config"] |= changes.pop("config", {})
    file.write_text(json.dumps(value | changes))


def make(folder: Path, out: Path) -> dict[str, Any]:
    sampler = Sampler.from_pretrained(folder, device="cpu")
    return generate_folder(sampler, out, [("healthy", 2)], seed=np.int64(3), model=folder, progress=silent)


@pytest.mark.parametrize("change", [{"n_head": 2}, {"norm_eps": 1e-3}, {"rope_base": 500.0}])
def test_an_edited_config_is_another_run(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """No weight shows these fields, so the digest stays: the old images must not pass for the new model's."""
    make(folder, tmp_path / "out")
    assert make(folder, tmp_path / "out")["made"] == 0
    edit(folder, config=change)
    with pytest.raises(InputError, match="holds a different run"):
        make(folder, tmp_path / "out")


@pytest.mark.parametrize("classes", ["healthy", None, 5, {}, [1, 2], ["healthy"], ["healthy", "npdr", "null"]])
def test_class_names_that_do_not_fit(folder: Path, classes: object) -> None:
    """A third name would draw from the null class."""
    edit(folder, classes=classes)
    with pytest.raises(InputError, match=r"name each class|list of names"):
        Sampler.from_pretrained(folder, device="cpu")


def test_names_and_tokenizers_that_do_not_fit_are_not_saved(tmp_path: Path, tiny_gpt: GPT, folder: Path) -> None:
    other = VQTokenizer(TokenizerConfig(ch=32, ch_mult=(1, 1), z_channels=32, codebook_size=32, image_size=12))
    with pytest.raises(InputError, match="a different name for each class"):
        save_gpt(tmp_path / "a", tiny_gpt, classes=("a", "a"))
    with pytest.raises(InputError, match="a tokenizer of 64 codes, found one of 32"):
        save_gpt(tmp_path / "a", tiny_gpt, tokenizer=other)
    checkpoint.save_tokenizer(tmp_path / "vq", other)
    with pytest.raises(InputError, match="a tokenizer of 64 codes, found one of 32"):
        convert(folder, tmp_path / "a", tokenizer=tmp_path / "vq")
    assert not (tmp_path / "a").exists()


def test_a_linked_folder_is_replaced_behind_its_link(tmp_path: Path, tiny_gpt: GPT) -> None:
    save_gpt(tmp_path / "disk" / "model", tiny_gpt, classes=CLASSES)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for names in (("a", "b"), ("c", "d"), CLASSES):
        save_gpt(tmp_path / "link", tiny_gpt, classes=names)
        assert (tmp_path / "link").is_symlink()
        assert tuple(checkpoint.read_config(tmp_path / "disk" / "model")["classes"]) == names
    assert {path.name for path in tmp_path.rglob("*") if path.name.startswith(".")} == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tok_embeddings.weight", torch.zeros(256, 64, dtype=torch.int64)),
        ("tok_embeddings.weight", torch.zeros(256, 64, dtype=torch.complex64)),
        ("tok_embeddings.weight", torch.zeros(256, 64).to_sparse()),
        ("tok_embeddings.weight", torch.zeros(256, 0)),
        ("tok_embeddings.weight", torch.tensor(1.0)),
        ("cls_embedding.embedding_table.weight", torch.tensor(1.0)),
        ("layers.0.attention.wqkv.weight", torch.tensor(1.0)),
        ("layers.0.feed_forward.w1.weight", torch.tensor(1.0)),
        ("layers.999999999.attention_norm.weight", torch.zeros(64)),
    ],
)
def test_weights_of_a_strange_kind(
    tmp_path: Path, golden: Path, weights: dict[str, Tensor], key: str, value: Tensor
) -> None:
    torch.save({**weights, key: value}, tmp_path / "file.pth")
    for config in (golden / "gpt_config.json", {"grid": 6}):
        with pytest.raises(InputError):
            load_gpt(tmp_path / "file.pth", config)


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("key", ["encoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight"])
def test_tokenizer_weights_of_a_strange_shape(tmp_path: Path, golden: Path, key: str, shape: tuple[int, ...]) -> None:
    model = torch.load(golden / "vq.pt", weights_only=True)["model"]
    torch.save({"model": {**model, key: torch.ones(shape)}, "discriminator": {1: 2}}, tmp_path / "file.pt")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "file.pt")


@pytest.mark.parametrize(("pixels", "factor"), [(256, 0), ([1], 3), ("a", 16), (torch.zeros(3), 16)])
def test_flags_that_make_no_grid(tmp_path: Path, weights: dict[str, Tensor], pixels: object, factor: object) -> None:
    args = argparse.Namespace(image_size=pixels, downsample_size=factor)
    torch.save({"model": weights, "args": args}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="image_size and downsample_size"):
        load_gpt(tmp_path / "file.pt")


@pytest.mark.parametrize("config", [{"dim": 2**42}, {"n_layer": 10**9}, {"grid": 10**5}])
def test_a_config_of_absurd_size(folder: Path, config: dict[str, Any]) -> None:
    edit(folder, config=config)
    with pytest.raises(InputError, match="correct the config"):
        load_gpt(folder)


def test_a_config_that_leaves_the_grid_open(golden: Path) -> None:
    """Only a size's name stands for 32 codes a side."""
    with pytest.raises(InputError, match="no weight shows its grid"):
        load_gpt(golden / "gpt_ddp.pt", {"n_head": 4})


def test_sizes_go_before_folders_of_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results often lie in a folder called as the model."""
    (tmp_path / "GPT-B").mkdir()
    monkeypatch.chdir(tmp_path)
    assert gpt_config("GPT-B") == GPTConfig()


def test_ch_mult_that_is_no_list() -> None:
    with pytest.raises(InputError, match="ch_mult as a list"):
        tokenizer_config({"encoder_ch_mult": 4})


def crafted(file: Path, **changes: str) -> Path:
    """The image with other text chunks."""
    with Image.open(file) as image:
        info, chunks = dict(image.info) | changes, PngInfo()
        for name in provenance.FIELDS:
            chunks.add_text(name, info[name])
        image.save(file.with_name("crafted.png"), pnginfo=chunks)
    return file.with_name("crafted.png")


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"implementation": "[]"},
        {"class": "2"},  # the null class
        {"class": "9"},
        {"class": "-1"},
        {"codes": "A"},
    ],
)
def test_crafted_provenance_is_refused(tmp_path: Path, folder: Path, changes: dict[str, str]) -> None:
    make(folder, tmp_path / "out")
    file = crafted(tmp_path / "out/images/healthy/000000.png", **changes)
    with pytest.raises(InputError, match="is damaged"):
        reproduce(file, folder, progress=silent)


def test_strange_surroundings_do_not_stop_reproduce(tmp_path: Path, folder: Path) -> None:
    make(folder, tmp_path / "out")
    file = tmp_path / "out/images/healthy/000000.png"
    made_by = provenance.read(file).implementation
    for threads in ("a", -1, None):
        again = reproduce(
            crafted(file, implementation=json.dumps({**made_by, "threads": threads})), folder, progress=silent
        )
        assert again["equal"]
    (tmp_path / "out/run.json").write_text("[5]")
    with pytest.raises(InputError, match=r"run\.json"):
        reproduce(file, progress=silent)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_an_endless_file_is_no_image() -> None:
    with pytest.raises(InputError, match="no PNG"):
        provenance.read("/dev/zero")


def test_numbers_far_too_large(tiny_sampler: Sampler) -> None:
    with pytest.raises(InputError, match="far too large"):
        SamplingParams(cfg_scale=10**400)
    with pytest.raises(InputError, match="unknown label"):
        resolve_label("1" * 5000, (), 2)
    assert len(tiny_sampler.generate(np.array([0, 1]))) == 2  # type: ignore[arg-type]


def test_empty_batches_of_a_tokenizer(tiny_tokenizer: VQTokenizer) -> None:
    assert tiny_tokenizer.encode(torch.zeros(0, 3, 12, 12)).shape == (0, 6, 6)
    assert tiny_tokenizer.decode(torch.zeros(0, 6, 6, dtype=torch.int64)).shape == (0, 3, 12, 12)
