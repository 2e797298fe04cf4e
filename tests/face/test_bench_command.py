"""`retinar bench` at the command line, with made-up results: its exit code, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retinar.bench import decoding, record
from tests.face.world import Shell


def result(wrong: list[str]) -> dict[str, Any]:
    found = {"context": 512, "page_size": 16, "cfg_scale": 2.0, "read": "sums", "rows": [], "absent": []}
    return {**record.document("cpu", [], {}, {"failed": wrong}), "only": "decoding", "decoding": found}


@pytest.mark.parametrize("wrong", [[], ["GPT-B, 1 image, ours: its logits differ"]])
def test_a_wrong_step_ends_with_1_and_a_sentence(
    wrong: list[str], shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "alone", lambda out, program: (out / "x.json", result(wrong)))
    said = shell("bench", "--only", "decoding", "--out", tmp_path)
    assert said.code == (1 if wrong else 0) and f"written to {tmp_path / 'x.json'}" in said.out
    assert said.err.count("\n") == len(wrong) and all(f"retinar: found wrong: {each}" in said.err for each in wrong)
    assert all(f"WRONG  {each}" in said.out for each in wrong)
    said = shell("bench", "--only", "decoding", "--out", tmp_path, "--json")
    assert said.code == (1 if wrong else 0) and json.loads(said.out)["tests"]["failed"] == wrong


def test_a_llama_cpp_that_is_none_is_refused(shell: Shell, tmp_path: Path) -> None:
    sentence = shell.refused(
        "bench", "--only", "decoding", "--llama-cpp", tmp_path / "none", words="llama-batched-bench"
    )
    assert str(tmp_path / "none") in sentence and "correct --llama-cpp" in sentence
    shell.refused("bench", "--only", "rope", "--llama-cpp", tmp_path, words="--only rope")
