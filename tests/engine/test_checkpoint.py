"""Checkpoints: upstream's layouts, our folders, and everything that can be wrong with either."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retinar.engine.checkpoint import (
    digest,
    load_gpt,
    load_tokenizer,
    read_config,
    save_gpt,
    save_tokenizer,
)
from retinar.engine.config import GPTConfig, TokenizerConfig
from retinar.engine.errors import InputError
from retinar.engine.files import sha256_file
from retinar.engine.model import GPT, from_upstream_state_dict, to_upstream_state_dict
from retinar.engine.tokenizer import VQTokenizer

GPT_CONFIG = GPTConfig(n_layer=2, n_head=2, dim=16, multiple_of=16, vocab_size=24, num_classes=2, grid=3)
VQ_CONFIG = TokenizerConfig(ch=16, ch_mult=(1, 2), z_channels=16, codebook_size=24, image_size=8, num_res_blocks=1)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) and x[key].dtype == y[key].dtype for key in x)


@pytest.fixture
def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPT_CONFIG)
    torch.nn.init.normal_(model.output.weight)
    return model


@pytest.fixture
def tokenizer() -> VQTokenizer:
    torch.manual_seed(1)
    model = VQTokenizer(VQ_CONFIG)
    model.quantize.codebook_used[:5] = torch.arange(5)
    return model


@pytest.fixture
def weights(gpt: GPT) -> dict[str, Tensor]:
    """Upstream's layout."""
    return {key: tensor.clone() for key, tensor in to_upstream_state_dict(gpt.state_dict()).items()}


# ---- upstream's files -------------------------------------------------------------------------------------------

ARGS = argparse.Namespace(
    gpt_model="GPT-B-of-a-fork", image_size=24, downsample_size=8, lr=1e-4, ema=True, code_path=None
)
LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "optimizer": {"state": {0: torch.ones(3)}}, "steps": 7, "args": ARGS},
    "module": lambda w: {"module": w},
    "state_dict": lambda w: {"state_dict": w},
    "wrapped": lambda w: {"model": {f"_orig_mod.module.{key}": tensor for key, tensor in w.items()}},
    "stray": lambda w: {"model": w | {"freqs_cis": torch.ones(10, 4, 2)}},
    "packed": lambda w: {"model": from_upstream_state_dict(w)},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, gpt: GPT, weights: dict[str, Tensor], layout: str, suffix: str) -> None:
    path = tmp_path / f"0000007{suffix}"
    torch.save(LAYOUTS[layout](weights), path)
    loaded = load_gpt(path, GPT_CONFIG.to_dict())
    assert equal(loaded, gpt) and loaded.config == GPT_CONFIG and not loaded.training
    assert torch.equal(loaded.rope_NC2, gpt.rope_NC2)


def test_old_files_that_are_no_zip(tmp_path: Path, gpt: GPT, weights: dict[str, Tensor]) -> None:
    torch.save({"model": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal(load_gpt(tmp_path / "old.pt", GPT_CONFIG), gpt)


def test_a_folder_of_fsdp_training(tmp_path: Path, gpt: GPT, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / "consolidated.pth")
    (tmp_path / "resume_step.txt").write_text("7")
    assert equal(load_gpt(tmp_path, GPT_CONFIG), gpt)
    assert digest(tmp_path) == digest(tmp_path / "consolidated.pth") == sha256_file(tmp_path / "consolidated.pth")


def test_ema(tmp_path: Path, gpt: GPT, weights: dict[str, Tensor]) -> None:
    average = {key: tensor + 1 for key, tensor in weights.items()}
    torch.save({"model": weights, "ema": average}, tmp_path / "both.pt")
    torch.save({"model": weights}, tmp_path / "one.pt")
    assert equal(load_gpt(tmp_path / "both.pt", GPT_CONFIG), gpt)
    assert torch.equal(load_gpt(tmp_path / "both.pt", GPT_CONFIG, ema=True).norm.weight, gpt.norm.weight + 1)
    with pytest.raises(InputError, match=r"averaged weights \(ema\)"):
        load_gpt(tmp_path / "one.pt", GPT_CONFIG, ema=True)


def test_dtypes(tmp_path: Path, gpt: GPT, weights: dict[str, Tensor]) -> None:
    torch.save({key: tensor.bfloat16() for key, tensor in weights.items()}, tmp_path / "half.pth")
    assert load_gpt(tmp_path / "half.pth", GPT_CONFIG).output.weight.dtype == torch.float32
    kept = load_gpt(tmp_path / "half.pth", GPT_CONFIG, dtype=None)
    assert kept.output.weight.dtype == torch.bfloat16 and kept.rope_NC2.dtype == torch.float32
    assert torch.equal(kept.output.weight, gpt.output.weight.bfloat16())


def test_configs_from_the_file_alone(tmp_path: Path, weights: dict[str, Tensor], golden: Path) -> None:
    """Shapes show most; the grid comes from the flags, the heads from a known size, or both from the user."""
    path = tmp_path / "file.pt"
    torch.save({"model": weights}, path)
    with pytest.raises(InputError, match=r"no weight shows its grid.*\"grid\""):
        load_gpt(path)
    with pytest.raises(InputError, match="state n_head"):
        load_gpt(path, {"grid": 3})
    assert load_gpt(path, {"grid": 3, "n_head": 2}).config == GPT_CONFIG  # multiple_of 16 by search

    partial = load_gpt(golden / "gpt_consolidated.pth", {"grid": 6}).config
    assert (partial.n_head, partial.n_layer, partial.vocab_size, partial.num_classes) == (1, 2, 256, 2)

    base = GPTConfig(n_layer=12, n_head=12, dim=768, vocab_size=8, num_classes=2, grid=3)
    with torch.device("meta"):
        shapes = {
            key: torch.empty(1).expand(t.shape) for key, t in to_upstream_state_dict(GPT(base).state_dict()).items()
        }
    torch.save({"model": {k: torch.zeros(1).expand(t.shape) for k, t in shapes.items()}, "args": ARGS}, path)
    assert load_gpt(path).config == base


def test_a_table_without_null_class(tmp_path: Path) -> None:
    """Upstream leaves its row out when trained without class dropout."""
    config = GPTConfig(**GPT_CONFIG.to_dict() | {"null_class": False, "class_dropout_prob": 0.0})
    torch.save(to_upstream_state_dict(GPT(config).state_dict()), tmp_path / "file.pth")
    stated = {"n_head": 2, "grid": 3, "num_classes": 2}
    assert load_gpt(tmp_path / "file.pth", stated).config.null_class is False
    assert load_gpt(tmp_path / "file.pth", stated | {"class_dropout_prob": 0.0}).config.class_rows == 2


def test_tokenizers_are_inferred_whole(tmp_path: Path, tokenizer: VQTokenizer) -> None:
    held = {key: tensor.float() for key, tensor in tokenizer.state_dict().items()}
    torch.save({"ema": held, "model": held}, tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt", {"image_size": 8})
    assert loaded.config == VQ_CONFIG and equal(loaded, tokenizer)
    assert equal(load_tokenizer(tmp_path / "vq.pt", VQ_CONFIG, ema=True), tokenizer)
    del held["quantize.codebook_used"]  # upstream's option not to track usage
    torch.save({"model": held}, tmp_path / "plain.pt")
    assert not load_tokenizer(tmp_path / "plain.pt").quantize.codebook_used.any()


# ---- what upstream's files may not be ---------------------------------------------------------------------------


class Malicious:
    """Unpickling this would create the file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"model": {"a": torch.ones(1)}, "args": bad}])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, wrap: Callable[[Any], Any], form: str) -> None:
    target, path = tmp_path / "created", tmp_path / "bad.pt"
    content = wrap(Malicious(target))
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for load in (load_gpt, load_tokenizer):
        with pytest.raises(InputError, match="was not run") as error:
            load(path, None)
        assert "\n" not in str(error.value)
        assert form == "pickle" or "system" in str(error.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))  # the trap does work where nobody looks
    assert target.exists()


def test_the_allowed_class_is_allowed_for_us_alone(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"model": weights, "args": ARGS}, tmp_path / "file.pt")
    load_gpt(tmp_path / "file.pt", GPT_CONFIG)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path: Path, weights: dict[str, Tensor], keep: float, zipped: bool) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(InputError, match="damaged, cut short or something else") as error:
        load_gpt(path, GPT_CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"hello, I am a text\n" * 50, b"\x89PNG\r\n\x1a\n" + bytes(200), b"\x80\x05."])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(InputError, match="damaged, cut short or something else"):
        load_gpt(tmp_path / "file.pt", GPT_CONFIG)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "found a list"),
        ({}, "found nothing"),
        ({"optimizer": {"state": {}}}, "found optimizer"),
        ({"model": {"a": 1}}, "found 'a'"),
        ({"model": {"a": torch.ones(1)}}, "found other weights"),
        ({"model": {"quantize.embedding.weight": torch.ones(1)}}, "found a tokenizer"),
    ],
)
def test_files_without_a_transformer(tmp_path: Path, content: Any, says: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(InputError, match=says):
        load_gpt(tmp_path / "file.pt", GPT_CONFIG)


def test_missing_files(tmp_path: Path) -> None:
    for load in (load_gpt, load_tokenizer):
        with pytest.raises(InputError, match="no such file"):
            load(tmp_path / "none.pt")
        with pytest.raises(InputError, match=r"no config.json"):
            load(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"did you mean .*model"):
        load_gpt(tmp_path)


def test_unknown_missing_and_misshapen_weights_are_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "file.pth"

    def says(content: dict[str, Tensor], config: GPTConfig = GPT_CONFIG) -> str:
        torch.save(content, path)
        with pytest.raises(InputError) as error:
            load_gpt(path, config)
        assert "\n" not in str(error.value)
        return str(error.value)

    text = says(
        {key: tensor for key, tensor in weights.items() if key != "norm.weight"} | {"extra.bias": torch.ones(1)}
    )
    assert "1 unknown (extra.bias) and 1 missing (norm.weight) keys" in text
    text = says(weights, GPTConfig(**GPT_CONFIG.to_dict() | {"n_layer": 3}))
    assert "7 missing (layers.2.attention.wqkv.weight, " in text and "…" in text and "number of layers" in text
    text = says(weights, GPTConfig(**GPT_CONFIG.to_dict() | {"vocab_size": 32}))
    assert "tok_embeddings.weight of shape [32, 16], found [24, 16]" in text and "vocab_size" in text
    text = says(weights, GPTConfig(**GPT_CONFIG.to_dict() | {"num_classes": 1000}))
    assert "cls_embedding.embedding_table.weight of shape [1001, 16], found [3, 16]" in text and "num_classes" in text
    text = says({key: tensor for key, tensor in weights.items() if not key.endswith(".w3.weight")})
    assert "2 missing (layers.0.feed_forward.w3.weight" in text


# ---- our folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, gpt: GPT, tokenizer: VQTokenizer, max_shard_bytes: int, dtype: torch.dtype) -> None:
    folder = tmp_path / "deep" / "gpt"
    gpt.to(dtype)
    extra = {"train": {"steps": 3}}
    save_gpt(
        folder, gpt, classes=("healthy", "npdr"), tokenizer=tokenizer, extra=extra, max_shard_bytes=max_shard_bytes
    )
    assert equal(load_gpt(folder, dtype=None), gpt)
    assert load_gpt(folder).output.weight.dtype == torch.float32
    assert equal(load_tokenizer(folder), tokenizer) and equal(load_tokenizer(folder / "tokenizer"), tokenizer)
    config = read_config(folder)
    assert (config["format"], config["kind"], config["classes"]) == (1, "gpt", ["healthy", "npdr"])
    assert config["train"] == {"steps": 3} and config["config"] == GPT_CONFIG.to_dict()
    assert config["sha256"] == digest(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == 3000) == (folder / "model.safetensors.index.json").exists()
    held = {key: tensor for path in shards for key, tensor in load_file(path).items()}
    assert held.keys() == to_upstream_state_dict(gpt.state_dict()).keys()  # files keep upstream's layout
    assert all(tensor.dtype == dtype for tensor in held.values())
    assert not list(tmp_path.rglob(".*"))
    if len(shards) == 1:
        assert digest(folder) == sha256_file(shards[0])


def test_tokenizer_files_hold_the_window_as_upstream_does(tmp_path: Path, tokenizer: VQTokenizer) -> None:
    save_tokenizer(tmp_path / "vq", tokenizer, discriminator={"main.0.weight": torch.ones(2)})
    assert load_file(tmp_path / "vq" / "model.safetensors")["quantize.codebook_used"].dtype == torch.float32
    assert load_file(tmp_path / "vq" / "discriminator.safetensors")["main.0.weight"].shape == (2,)
    assert "8 pixels a code" not in (tmp_path / "vq" / "README.md").read_text()
    assert "2x2 pixels a code, 24 codes" in (tmp_path / "vq" / "README.md").read_text()


def test_equal_weights_give_equal_digests(tmp_path: Path, gpt: GPT) -> None:
    save_gpt(tmp_path / "a", gpt)
    save_gpt(tmp_path / "b", gpt, classes=("x", "y"))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    with torch.no_grad():
        gpt.norm.weight[0] += 1e-3
    save_gpt(tmp_path / "c", gpt)
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_stored_config_gives_way_to_the_callers(tmp_path: Path, gpt: GPT) -> None:
    save_gpt(tmp_path / "a", gpt)
    changed = load_gpt(tmp_path / "a", {"attn_dropout_p": 0.3})
    assert changed.config == GPTConfig(**GPT_CONFIG.to_dict() | {"attn_dropout_p": 0.3})


def test_saving_replaces_checkpoints_and_nothing_else(tmp_path: Path, gpt: GPT, tokenizer: VQTokenizer) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    save_gpt(folder, gpt, tokenizer=tokenizer, max_shard_bytes=3000)  # an empty folder is free
    save_gpt(folder, gpt)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        save_gpt(folder, gpt)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        save_gpt(tmp_path / "file", gpt)
    assert (folder / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert equal(load_gpt(folder), gpt)


def test_a_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, gpt: GPT, tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gpt(tmp_path / "a", gpt)
    before = digest(tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_gpt(tmp_path / "a", gpt, tokenizer=tokenizer)
    assert digest(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_wrong_class_names_and_extra_keys(tmp_path: Path, gpt: GPT) -> None:
    with pytest.raises(InputError, match="Expected 2 class names, found 1"):
        save_gpt(tmp_path / "a", gpt, classes=("healthy",))
    with pytest.raises(ValueError, match="sha256"):
        save_gpt(tmp_path / "a", gpt, extra={"sha256": "0"})
    assert not (tmp_path / "a").exists()


def damage(folder: Path, name: str, how: str) -> None:
    path = folder / name
    content = path.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "flipped": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    }
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "gone"])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 4000])
def test_damaged_weights(tmp_path: Path, gpt: GPT, max_shard_bytes: int, how: str) -> None:
    save_gpt(tmp_path / "a", gpt, max_shard_bytes=max_shard_bytes)
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    damage(tmp_path / "a", shards[len(shards) // 2].name, how)
    with pytest.raises(InputError, match="not complete" if how == "gone" else "damaged or was changed"):
        load_gpt(tmp_path / "a")


@pytest.mark.parametrize("how", ["cut", "empty"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json(tmp_path: Path, gpt: GPT, name: str, how: str) -> None:
    save_gpt(tmp_path / "a", gpt, max_shard_bytes=4000)
    damage(tmp_path / "a", name, how)
    with pytest.raises(InputError, match="damaged"):
        load_gpt(tmp_path / "a")


def test_a_digest_does_not_excuse_broken_safetensors(tmp_path: Path, gpt: GPT) -> None:
    save_gpt(tmp_path / "a", gpt)
    damage(tmp_path / "a", "model.safetensors", "cut")
    fields = json.loads((tmp_path / "a" / "config.json").read_text()) | {"sha256": digest(tmp_path / "a")}
    (tmp_path / "a" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="found a damaged file"):
        load_gpt(tmp_path / "a")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": 2}, "format 1 .* found 2"),
        ({"kind": "tokenizer"}, "Expected a transformer"),
        ({"kind": "iddpm"}, "found a diffusion model"),
        ({"kind": "cat"}, "found something else"),
        ({"config": None}, "found something else"),
        ({"config": {"n_layer": "2"}}, "Expected n_layer as int"),
        ({"sha256": "0"}, "the digest in its config.json"),
    ],
)
def test_foreign_configs(tmp_path: Path, gpt: GPT, fields: dict[str, Any], says: str) -> None:
    save_gpt(tmp_path / "a", gpt)
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(stored | fields))
    with pytest.raises(InputError, match=says):
        load_gpt(tmp_path / "a")


def test_ema_is_not_in_folders(tmp_path: Path, gpt: GPT) -> None:
    save_gpt(tmp_path / "a", gpt)
    with pytest.raises(InputError, match="leave out ema"):
        load_gpt(tmp_path / "a", ema=True)


def test_an_index_cannot_point_out_of_the_folder(tmp_path: Path, gpt: GPT) -> None:
    save_gpt(tmp_path / "a", gpt, max_shard_bytes=4000)
    save_file({"norm.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../b.safetensors"}}))
    with pytest.raises(InputError, match="not complete"):
        load_gpt(tmp_path / "a")


def test_loaded_weights_outlive_the_folder(tmp_path: Path, gpt: GPT) -> None:
    """Nothing stays mapped: a replaced or truncated file does not reach a model in memory."""
    save_gpt(tmp_path / "a", gpt)
    loaded = load_gpt(tmp_path / "a", dtype=None)
    os.truncate(tmp_path / "a" / "model.safetensors", 0)
    assert equal(loaded, gpt)
