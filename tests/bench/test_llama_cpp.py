"""llama.cpp beside our decode step: a program made here stands in for its own; its model is read back with gguf."""

from __future__ import annotations

import errno
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinar.bench import decoding, decoding_run, report, roofline, run
from retinar.bench.baselines import gguf_model, llama_cpp, static_cache
from retinar.bench.deadline import Deadline
from retinar.bench.decoding_sizes import LLAMA_CPP, SIZES, DecodingSize, random_weights
from retinar.engine.config import gpt_config
from retinar.engine.errors import InputError
from retinar.kernels import ops

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
CONFIG = gpt_config("GPT-tiny", n_layer=2, n_head=2, dim=64, multiple_of=32, vocab_size=96, grid=3, n_kv_head=1)
TINY = SIZES["exercise"]
FAKE = """
    import json, sys, time
    from pathlib import Path
    if sys.argv[1:] == ["--version"]:
        sys.exit(print("version: 9 (c0ffee)", file=sys.stderr))
    words = [word for word in sys.argv[1:] if word != "-pps"]
    given = dict(zip(words[::2], words[1::2]))
    rows = [int(each) for each in given["-npl"].split(",")]
    pp, tg, cache, flash = int(given["-npp"]), int(given["-ntg"]), given["-ctk"], given["-fa"]
    assert Path(given["-m"]).read_bytes()[:4] == b"GGUF" and given["-ctv"] == cache and "-pps" in sys.argv
    with Path(__file__).with_suffix(".log").open("a") as log:
        print(json.dumps(given), file=log)

    def tell(seconds, slots=None):
        for each in rows:
            slots = slots or each * (pp + tg)
            found = {"pp": pp, "tg": tg, "pl": each, "n_kv": slots, "t_pp": 9.0, "t_tg": seconds * tg}
            print("\\x1b[0m" + json.dumps(found))

    print("load: adding dummy tokens", file=sys.stderr)
    print("{not JSON}\\n[1]\\n{}\\n")
"""
FASTEST = 'tell({"f16on": 3e-3, "f16off": 5e-3, "bf16on": 4e-3, "bf16off": 2e-3}[cache + flash])'


def fake(folder: Path, ending: str = FASTEST, name: str = llama_cpp.PROGRAM) -> Path:
    """A program that ends as told."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(FAKE)}\n{ending}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def weights() -> ops.DecodeWeights:
    return random_weights(CONFIG, torch.bfloat16)


def measured(program: Path, weights: ops.DecodeWeights, seconds: float = 60.0) -> llama_cpp.Found:
    peer = llama_cpp.LlamaCpp(program, weights, CONFIG, 3)
    try:
        return peer.measure(gguf_model.Q8_0, 4, 64, seconds)
    finally:
        peer.close()


@pytest.mark.parametrize("folder", ["", "bin", "build/bin"])
def test_the_program_is_found_in_a_build(folder: str, tmp_path: Path) -> None:
    program = fake(tmp_path / folder)
    assert llama_cpp.check(tmp_path) == llama_cpp.check(program) == program.resolve()
    assert llama_cpp.version(program) == "9 (c0ffee)"


def test_a_wrong_path_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("missing", "empty", "plain", "other"):
        (tmp_path / folder).mkdir(exist_ok=folder != "missing")
    fake(tmp_path / "plain").chmod(0o644)
    other = fake(tmp_path / "other", name="llama-cli")
    for path in (tmp_path / "none", tmp_path / "empty", tmp_path / "plain", tmp_path / "other", other):
        with pytest.raises(InputError, match=f"Expected llama.cpp's program llama-batched-bench at {path} "):
            run.run_suite("cpu", tmp_path / "out", None, path)
        assert decoding.main(["--llama-cpp", str(path), "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and "correct --llama-cpp" in told.err and told.out == ""
    with pytest.raises(InputError, match=r"Expected --llama-cpp with decoding on a CPU, found it with .* --only rope"):
        run.run_suite("cpu", tmp_path / "out", "rope", fake(tmp_path))
    monkeypatch.setattr(gguf_model, "missing", lambda: True)
    with pytest.raises(InputError, match=r"Expected the package gguf, .* run `pip install gguf`"):
        llama_cpp.check(fake(tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_fastest_way_counts(tmp_path: Path, weights: ops.DecodeWeights) -> None:
    program = fake(tmp_path)
    found = measured(program, weights)
    assert found.way == ("bf16", "off") and found.seconds == pytest.approx([2e-3] * llama_cpp.WINDOWS)
    told = [json.loads(line) for line in program.with_suffix(".log").read_text().splitlines()]
    assert [(each["-ctk"], each["-fa"]) for each in told] == [*llama_cpp.WAYS, ("bf16", "off")]
    last = told[-1]
    assert (last["-npl"], last["-npp"], last["-ntg"], last["-c"]) == ("4,4,4", "32", "32", "256")
    assert last["-t"] == last["-tb"] == "3" and last["-dev"] == "none"
    assert not Path(last["-m"]).parent.exists()


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("sys.exit('no such type\\n\\n')", "llama-batched-bench ended with exit code 1: no such type"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with signal 9: load: adding dummy tokens"),
        ("pass", "told 0 of 1 times: {}"),
        ("rows = [rows[0] + 1]; tell(1e-3)", "told 0 of 1 times"),
        ("tell(1e-3, pp + rows[0] * tg)", "its 4 sequences share one cache of 160 slots: it needs a newer llama.cpp"),
        ("tell(float('nan'))", "told 0 of 1 times"),
    ],
)
def test_what_fails_says_why(ending: str, words: str, tmp_path: Path, weights: ops.DecodeWeights) -> None:
    with pytest.raises(llama_cpp.Failed) as caught:
        measured(fake(tmp_path, ending), weights)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_way_that_a_build_lacks_is_left_out(tmp_path: Path, weights: ops.DecodeWeights) -> None:
    found = measured(fake(tmp_path, f"assert cache == 'f16'; {FASTEST}"), weights)
    assert found.way == ("f16", "on")


def test_a_program_that_hangs_is_stopped(tmp_path: Path, weights: ops.DecodeWeights) -> None:
    with pytest.raises(llama_cpp.Failed, match=r"it took longer than the 0\.\d+ s that it was given"):
        measured(fake(tmp_path, "time.sleep(60)"), weights, 1.0)
    with pytest.raises(llama_cpp.Failed, match="no time was left"):
        measured(fake(tmp_path), weights, 0.0)


def test_one_window_counts_where_there_is_no_time_for_more(tmp_path: Path, weights: ops.DecodeWeights) -> None:
    found = measured(fake(tmp_path, f"assert len(rows) == 1; {FASTEST}"), weights)
    assert found.way == ("bf16", "off") and found.seconds == pytest.approx([2e-3])


def test_a_program_of_another_machine(tmp_path: Path, weights: ops.DecodeWeights) -> None:
    program = fake(tmp_path)
    program.write_bytes(b"\x7fELF of something else")
    with pytest.raises(llama_cpp.Failed, match="llama-batched-bench cannot be run"):
        measured(program, weights)
    assert llama_cpp.version(program) is None


def test_a_full_disk(tmp_path: Path, weights: ops.DecodeWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> Path:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_model, "write", full)
    peer = llama_cpp.LlamaCpp(fake(tmp_path), weights, CONFIG, 1)
    with pytest.raises(llama_cpp.Failed, match=r"could not be written to .* \(No space left on device\)"):
        peer.measure(gguf_model.BF16, 2, 64, 60.0)
    folder = Path(peer._folder.name)
    assert list(folder.iterdir()) == []
    peer.close()
    assert not folder.exists()


@pytest.mark.parametrize("kind", [gguf_model.BF16, gguf_model.Q8_0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_is_ours(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = random_weights(CONFIG, dtype)
    reader = gguf.GGUFReader(gguf_model.write(tmp_path / "model.gguf", weights, CONFIG, kind))
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "llama" and value["tokenizer.ggml.model"] == "no_vocab"
    assert value["llama.block_count"] == 2 and value["llama.embedding_length"] == 64
    assert value["llama.attention.head_count"] == 2 and value["llama.attention.head_count_kv"] == 1
    assert value["llama.feed_forward_length"] == CONFIG.ffn_hidden and value["llama.vocab_size"] == 96
    assert value["llama.rope.dimension_count"] == 32 and value["llama.context_length"] == 9
    found = {each.name: each for each in reader.tensors}
    expected = dict(gguf_model.named(weights))
    assert list(found) == list(expected) and len(found) == 3 + 2 * 9
    assert expected["blk.1.attn_k.weight"].shape == (32, 64)
    for name, tensor in expected.items():
        each = found[name]
        assert each.tensor_type.name == (kind if tensor.dim() == 2 else "F32")
        assert list(each.shape) == list(tensor.shape)[::-1]  # GGUF counts from the innermost
        numbers = gguf.quants.dequantize(each.data, each.tensor_type).reshape(tensor.shape)
        error = np.abs(numbers - tensor.float().numpy()).max()
        assert error <= (0 if tensor.dim() == 1 else 0.01 * float(tensor.abs().max()))


def test_the_work_of_a_step() -> None:
    config = SIZES["cpu"].config(SIZES["cpu"].cases[-1])
    ours = roofline.work_of(config, 4, 496, torch.bfloat16, torch.bfloat16)
    assert llama_cpp.work_of(config, 4, 512, gguf_model.BF16) == ours
    quantised = llama_cpp.work_of(config, 4, 512, gguf_model.Q8_0)
    assert quantised == ours._replace(weight_bytes=ours.weight_bytes * 17 // 32)


def exercise(monkeypatch: pytest.MonkeyPatch, program: Path, told: list[str], **more: Any) -> decoding_run.Decoding:
    monkeypatch.setattr(static_cache, "frozen", lambda module, size, *example: module)
    size = DecodingSize(**{**vars(TINY), "cases": TINY.cases[:1]})
    options = {"deadline": Deadline(1e6), "exercise": True, **more}
    return decoding_run.Decoding(size, say=told.append, program=program, **options)


def test_its_rows_stand_in_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache, "frozen", lambda module, size, *example: module)
    _, content = decoding.alone(tmp_path / "out", exercise=True, program=fake(tmp_path), say=lambda _: None)
    found = content["decoding"]
    rows = [row for row in found["rows"] if row["backend"] in LLAMA_CPP.values()]
    assert [(row["images"], row["backend"]) for row in rows] == [
        (case.images, name) for case in TINY.cases for name in LLAMA_CPP.values()
    ]
    for row in rows:
        assert row["baseline"] and row["step_p50"] == pytest.approx(2e-3) and row["cache"] == "bfloat16"
        assert row["flash_attention"] is False and row["steps"] == 3 * llama_cpp.WINDOWS and row["error"] is None
        assert len(row["read_bytes_per_s"]) == 2 and row["weights"] in (gguf_model.BF16, gguf_model.Q8_0)
    if ops.native_info()["loaded"]:
        names = [row["backend"] for row in found["rows"][: len(found["rows"]) // 2]]
        assert names[3:] == ["ours", "llama.cpp BF16", "ours, int8 weights", "llama.cpp Q8_0", names[-1]]
    assert found["absent"] == [] or not ops.native_info()["loaded"]
    assert content["tests"]["failed"] == [] and found["llama_cpp"] == "9 (c0ffee)"
    shown = report.markdown(content)
    assert "llama.cpp Q8_0, bfloat16 cache, no flash attention" in shown and "without guidance" in shown


def test_what_fails_is_absent_and_ours_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    bench = exercise(monkeypatch, fake(tmp_path, "sys.exit('bad model')"), told)
    bench.run()
    reasons = {each["backend"]: each["reason"] for each in bench.absent}
    assert reasons["llama.cpp BF16"] == reasons["llama.cpp Q8_0"]
    assert reasons["llama.cpp BF16"] == "llama-batched-bench ended with exit code 1: bad model"
    assert bench.wrong == [] and len(bench.rows) == (6 if ops.native_info()["loaded"] else 3)
    assert any("llama.cpp BF16: absent, llama-batched-bench ended" in line for line in told)

    def refuses(*_: object) -> None:
        raise ValueError("no such field\nand more")

    monkeypatch.setattr(gguf_model, "write", refuses)
    bench = exercise(monkeypatch, fake(tmp_path), told)
    bench.run()
    assert {each["reason"] for each in bench.absent if "llama" in each["backend"]} == {"ValueError: no such field"}


def test_it_takes_no_time_that_later_cases_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def measure(self: object, kind: str, rows: int, context: int, seconds: float) -> llama_cpp.Found:
        given.append(seconds)
        raise llama_cpp.Failed("not now")

    monkeypatch.setattr(llama_cpp.LlamaCpp, "measure", measure)
    deadline = Deadline(100.0, clock=lambda: 0.0)
    bench = exercise(monkeypatch, fake(tmp_path), [], deadline=deadline, exercise=False)
    bench.size = TINY
    bench.run()
    assert [case.seconds for case in TINY.cases] == [60.0, 60.0] and bench.left_out == []
    assert given == [40.0, 40.0, 60.0, 60.0]
