"""LlamaGen from a user's clone: a clone made here stands in for it, with the same functions and nothing of its code."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from retinar.bench import gpu
from retinar.bench.baselines.upstream import Upstream, check_clone, model_arguments
from retinar.bench.sampling_sizes import SIZES
from retinar.engine.config import gpt_config
from retinar.engine.errors import InputError

CONFIG = SIZES["exercise"].config

GPT = """
    from dataclasses import dataclass
    import torch

    @dataclass
    class ModelArgs:
        n_layer: int
        n_head: int
        dim: int
        vocab_size: int
        num_classes: int
        block_size: int
        n_kv_head: int = None
        multiple_of: int = 256
        class_dropout_prob: float = 0.1
        model_type: str = "c2i"
        cls_token_num: int = 1

    class Transformer(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            self.num_classes, self.args = args.num_classes, args
            self.tok_embeddings = torch.nn.Embedding(args.vocab_size, args.dim)
            self.output = torch.nn.Linear(args.dim, args.vocab_size, bias=False)
            self.output.weight.data.zero_()

        def setup_caches(self, max_batch_size, max_seq_length, dtype):
            self.room = (max_batch_size, max_seq_length, dtype)

        def forward(self, tokens, cond_idx, input_pos):
            assert int(input_pos) <= self.args.block_size
            return self.output(self.tok_embeddings(tokens if cond_idx is None else cond_idx[:, None]))
"""
GENERATE = """
    import sys
    import torch
    print("a clone may print what it likes")

    def prefill(model, cond, input_pos, cfg_scale, **sampling):
        assert cond.tolist()[len(cond) // 2 :] == [2] * (len(cond) // 2)
        return model(None, cond, input_pos)[: len(cond) // 2].argmax(-1)

    def decode_n_tokens(model, token, input_pos, count, cfg_scale, cfg_interval, **sampling):
        assert model.room[1] == 10 and cfg_scale == 2.0 and cfg_interval == -1
        assert sampling == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        made = []
        for _ in range(count):
            token = model(torch.cat([token, token]), None, input_pos)[: len(token)].argmax(-1)
            input_pos += 1
            made.append(token)
        return made, None

    def generate(model, cond, count, cfg_scale=1.0, **sampling):
        return torch.zeros(len(cond), count, dtype=torch.int)
"""


def clone(folder: Path, generate: str = GENERATE) -> Path:
    models = folder / "autoregressive" / "models"
    models.mkdir(parents=True)
    (models / "gpt.py").write_text(textwrap.dedent(GPT))
    (models / "generate.py").write_text(textwrap.dedent(generate))
    return folder


def job(**changes: Any) -> dict[str, Any]:
    about = {"device": "cpu", "dtype": "float32", "model": model_arguments(CONFIG), "images": 2, "cfg_scale": 2.0}
    return {**about, "compile": "", "first": 4, "steps": 3, "whole_seconds": 60.0, **changes}


def test_the_clones_code_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    with Upstream(check_clone(clone(tmp_path))) as process:
        found = process.measure(job(), 60)
        assert len(found["seconds"]) == 3 and min(found["seconds"]) > 0
        assert found["whole"] > 0 and "math" in found["attention"] and found["peak_bytes"] is None
        assert process.measure(job(whole_seconds=0.0), 60)["whole"] is None
        told = process.measure(job(model={**model_arguments(CONFIG), "unknown": 1}), 60)
        assert told["error"].startswith("TypeError") and "unknown" in told["error"]
        assert not process.over and len(process.measure(job(images=1), 60)["seconds"]) == 3  # it goes on


def test_a_clone_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    with Upstream(clone(tmp_path, "import no_such_package")) as process:
        found = process.measure(job(), 60)
    assert found["error"] == "ModuleNotFoundError: No module named 'no_such_package'"


def test_a_clone_that_ends_its_process_is_told(tmp_path: Path) -> None:
    with Upstream(clone(tmp_path, "import os; os._exit(3)")) as process:
        assert "its process ended" in process.measure(job(), 60)["error"]
        assert "its process ended" in process.measure(job(), 60)["error"]
        assert process.over


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    with Upstream(clone(tmp_path, "import time; time.sleep(600)")) as process:
        found = process.measure(job(), 0.5)
    assert found["late"] and "it took longer than" in found["error"]


def test_a_folder_that_is_no_clone_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"autoregressive/models/gpt\.py and no .*generate\.py"):
        check_clone(tmp_path)
    flags = ["--device", "cpu", "--only", "sampling", "--out", str(tmp_path / "out"), "--upstream", str(tmp_path)]
    assert gpu.main(flags) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "LlamaGen" in told.err and told.out == ""
    assert not (tmp_path / "out").exists()


def test_a_config_in_its_words() -> None:
    found = model_arguments(gpt_config("GPT-XL"))
    assert (found["n_layer"], found["n_head"], found["dim"], found["block_size"]) == (36, 20, 1280, 1024)
    assert (found["vocab_size"], found["num_classes"], found["model_type"]) == (16384, 1000, "c2i")
