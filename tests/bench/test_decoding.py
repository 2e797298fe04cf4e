"""Decoding on a CPU: an exercise of all of it, its steps, its limit, its targets and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.bench import (
    decoding,
    decoding_run,
    decoding_state,
    readme,
    record,
    report,
    report_decoding,
    report_page,
    roofline,
    run,
    targets_decoding,
)
from retinar.bench.baselines import static_cache
from retinar.bench.baselines.eager_step import EagerStep
from retinar.bench.deadline import Deadline
from retinar.bench.decoding_sizes import (
    CUT,
    EAGER,
    INT8,
    INT8_CACHE,
    LLAMA_CPP,
    OURS,
    SIZES,
    STATIC,
    DecodingSize,
    random_weights,
)
from retinar.engine.config import gpt_config
from retinar.engine.files import write_json
from retinar.kernels import ops

NATIVE = ops.native_info()["loaded"]
MINE = (OURS, INT8, INT8_CACHE)
XL = gpt_config("GPT-XL")
TINY = SIZES["exercise"]


def quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def exercise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """The whole of it at tiny sizes, nothing compiled: (file, content, progress)."""
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(static_cache, "frozen", lambda module, size, *example: module)
        path, content = decoding.alone(tmp_path_factory.mktemp("results"), exercise=True, say=told.append)
    return path, content, told


def tiny_run(monkeypatch: pytest.MonkeyPatch, **more: Any) -> decoding_run.Decoding:
    """Nothing is compiled."""
    monkeypatch.setattr(static_cache, "frozen", lambda module, size, *example: module)
    return decoding_run.Decoding(TINY, Deadline(1e6), exercise=True, say=quiet, **more)


def test_the_exercise_measures_every_row_of_every_case(exercise: tuple[Path, dict[str, Any], list[str]]) -> None:
    path, content, told = exercise
    assert record.load(path) == content and content["tests"]["failed"] == [] and content["only"] == "decoding"
    found = {(row["model"], row["images"], row["backend"]) for row in content["decoding"]["rows"]}
    wanted = (EAGER, STATIC, CUT, *(MINE if NATIVE else ()))
    assert found == {(case.model, case.images, name) for case in TINY.cases for name in wanted}
    assert {each["backend"] for each in content["decoding"]["absent"]} == set() if NATIVE else set(MINE)
    for row in content["decoding"]["rows"]:
        assert row["step_min"] <= row["step_p50"] <= row["step_max"] and row["steps"] >= TINY.least
        assert len(row["read_bytes_per_s"]) == 2 and min(row["read_bytes_per_s"]) > 0
        expected = 60 * row["images"] / (9 * row["step_p50"])
        assert row["images_per_minute"] == pytest.approx(expected) and row["error"] < 0.1
        assert (row["compile_seconds"] is not None) == (row["backend"] in (STATIC, CUT))
        if row["backend"] in MINE:
            assert all(each["seconds"] >= 0 for each in row["phases"])
            assert row["short_step_p50"] > 0 and {each["name"] for each in row["phases"]} >= {"attention", "w13"}
    assert {each["state"] for each in content["decoding"]["targets"]} == {"not measured"}
    assert sum("compiled in" in line for line in told) == 4 and any("GB/s" in line for line in told)
    shown = report.markdown(content)
    assert "EXERCISE" in shown and STATIC in shown and "limit / measured" in shown


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_the_eager_steps_logits_are_the_references(kv_heads: int | None) -> None:
    config = gpt_config("GPT-tiny", n_layer=2, n_head=2, dim=32, n_kv_head=kv_heads, vocab_size=101, grid=3)
    weights = random_weights(config, torch.float32)
    cache = decoding_state.filled_cache(config, 4, TINY, torch.float32)
    inputs = decoding_state.step_inputs(config, 2, TINY.context - 1, TINY.page_size)
    step = EagerStep(weights, 2, config.block_size)
    step.load(cache.k_LPSGD, cache.v_LPSGD, inputs.block_table_BM)
    tokens_B, found_BV = step(inputs.tokens_B, torch.tensor([TINY.context - 1]), 2.0)
    _, expected_BV = ops.decode_step(weights, cache.k_LPSGD, cache.v_LPSGD, inputs, backend="reference")
    assert torch.allclose(found_BV, expected_BV, rtol=1e-4, atol=1e-6)
    assert tokens_B.shape == (4,) and torch.equal(tokens_B[:2], tokens_B[2:])


def test_a_frozen_step_is_the_step() -> None:
    weights = random_weights(gpt_config(TINY.config(TINY.cases[0]), n_layer=1), torch.float32)
    module = static_cache.StaticCacheStep(weights, 1, 9, fused=True)
    example = torch.tensor([5, 5]), torch.tensor([3]), 2.0
    with torch.no_grad():
        found_BV = static_cache.frozen(module, "exercise", *example)(*example)[1]
        assert torch.allclose(found_BV, module(*example)[1], rtol=1e-5, atol=1e-7)


def test_no_two_layers_have_equal_weights() -> None:
    weights = random_weights(TINY.config(TINY.cases[0]), torch.bfloat16)
    assert not torch.equal(weights.wqkv[0], weights.wqkv[1])
    assert float(weights.w2[0].float().std()) == pytest.approx(0.02, rel=0.2)


def test_an_early_step_leaves_what_a_late_one_reads() -> None:
    config = TINY.config(TINY.cases[0])
    weights = random_weights(config, torch.float32)
    cache = decoding_state.filled_cache(config, 2, TINY, torch.float32)
    late = decoding_state.step_inputs(config, 1, TINY.context - 1, TINY.page_size)
    early = decoding_state.on_one_page(late, TINY.context - 1, TINY.page_size)

    def logits_BV(inputs: ops.StepInputs) -> torch.Tensor:
        return ops.decode_step(weights, cache.k_LPSGD, cache.v_LPSGD, inputs, backend="reference")[1]

    before_BV = logits_BV(late)
    assert not torch.equal(logits_BV(early), before_BV)
    assert torch.equal(logits_BV(late), before_BV)


def test_the_work_of_the_papers_model() -> None:
    """1.505 GB of weights, 184,320 bytes of cache a slot and row; two operations a weight and row."""
    plain = roofline.work_of(XL, 4, 512, torch.bfloat16, torch.bfloat16)
    assert plain.weight_bytes == pytest.approx(1.505e9, rel=1e-3)
    assert plain.cache_bytes == 8 * 512 * 184320 and plain.flops == 8 * plain.weight_bytes
    small = roofline.work_of(XL, 4, 512, torch.int8, torch.int8)
    outputs = 36 * (5 * 1280 - 1280 + 2 * XL.ffn_hidden + 1280) + 16384
    assert small.weight_bytes == plain.weight_bytes // 2 + 4 * outputs
    assert small.cache_bytes == plain.cache_bytes // 2 + 8 * 512 * 2 * 36 * 20 * 4
    assert small.flops == plain.flops


def test_the_limit_is_the_greater_of_weights_and_products_and_then_the_cache() -> None:
    work = roofline.Work(100, 30, 1000)
    assert roofline.limit(work, roofline.Rates(10.0, 1000.0)) == 13.0
    assert roofline.limit(work, roofline.Rates(5.0, 15.0), roofline.Rates(15.0, 5.0)) == 103.0
    assert roofline.limit(work, roofline.Rates(10.0, None)) is None


def test_the_loops_of_the_limit() -> None:
    assert roofline.ReadLoop(2**16).bytes_per_s() > 0
    assert (roofline.product_rate(32, torch.bfloat16) or 0) > 0


def test_wrong_logits_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny_run(monkeypatch)
    monkeypatch.setattr(decoding_run, "TOLERANCE", {STATIC: -1.0, INT8: -1.0})
    bench.run()
    found = {row["backend"] for row in bench.rows}
    assert STATIC not in found and INT8 not in found and {EAGER, CUT} <= found
    assert {each["backend"] for each in bench.absent} >= {STATIC} and "differ" in bench.absent[0]["reason"]
    if NATIVE:
        assert len(bench.wrong) == len(TINY.cases) and INT8 in bench.wrong[0] and "differ" in bench.wrong[0]


def test_what_cannot_run_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler\nand more")

    bench = tiny_run(monkeypatch)
    monkeypatch.setattr(static_cache, "frozen", fails)
    monkeypatch.setattr(ops, "native_info", lambda: {"loaded": False, "isa": None, "reason": "it is not built"})
    bench.run()
    assert {row["backend"] for row in bench.rows} == {EAGER} and bench.wrong == []
    reasons = {each["backend"]: each["reason"] for each in bench.absent}
    assert reasons == {
        STATIC: "RuntimeError: no compiler",
        CUT: "RuntimeError: no compiler",
        **dict.fromkeys(MINE, "it is not built"),
    }


@pytest.mark.skipif(not NATIVE, reason="the compiled module is not loaded")
def test_ours_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("a bad shape")

    bench = tiny_run(monkeypatch)
    monkeypatch.setattr(ops.NativeDecoder, "step", fails)
    bench.run()
    assert len(bench.wrong) == 3 * len(TINY.cases) and "ValueError: a bad shape" in bench.wrong[0]


def test_cases_without_time_are_named() -> None:
    bench = decoding_run.Decoding(SIZES["cpu"], Deadline(0.0), say=quiet)
    bench.size = DecodingSize(**{**vars(SIZES["cpu"]), "read_bytes": 2**12})
    bench.run()
    assert bench.rows == [] and len(bench.left_out) == len(SIZES["cpu"].cases)
    assert "GPT-XL, 4 images" in bench.left_out[-1]


def test_the_commands_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding, "alone", lambda out, program: (out / "x.json", {"only": "decoding"}))
    assert run.run_suite("cpu", tmp_path, "decoding") == (tmp_path / "x.json", {"only": "decoding"})


def row(model: str, images: int, backend: str, milliseconds: float, share: float = 0.5) -> dict[str, Any]:
    int8 = {OURS: 0, INT8: 1, INT8_CACHE: 2}.get(backend, 0)
    return {
        "name": "decoding", "model": model, "images": images, "backend": backend, "baseline": backend not in MINE,
        "weights": "int8" if int8 else "bfloat16", "cache": "int8" if int8 > 1 else "bfloat16", "steps": 9,
        "compile_seconds": None, "share": share, "limit_seconds": share * milliseconds / 1e3,
        "step_p50": milliseconds / 1e3, "step_min": milliseconds / 1e3, "step_max": milliseconds / 1e3,
        "images_per_minute": 5.0, "read_bytes_per_s": [30e9, 50e9], "flops_per_s": [150e9, 250e9],
        "weight_bytes": 200_000_000, "cache_bytes": 40_000_000, "flops": 400_000_000,
        "short_step_p50": milliseconds / 2e3, "phases": [{"name": "attention", "seconds": 1e-3}],
    }  # fmt: skip


def content(rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    found = {"context": 512, "page_size": 16, "cfg_scale": 2.0, "read": "sums", "rows": list(rows), "absent": []}
    head = {"format": record.FORMAT, "device": "CPU", "kind": "cpu", "cores": 2, "threads": 2, "torch": "2"}
    head |= {"date": "2026-01-01", "commit": "c0ffee", "command": "x", "limits": {}, "rows": []}
    return {**head, "tests": {}, "decoding": found, "only": "decoding", **more}


def states(rows: Sequence[dict[str, Any]], **more: Any) -> dict[tuple[str, str], str]:
    return {(each["case"], each["what"]): each["state"] for each in targets_decoding.evaluate(content(rows, **more))}


CASE = "GPT-B, 1 at once"
OVER_EAGER, LIMIT = "over upstream-like eager", "limit over measured"
OVER_STATIC, OVER_CUT = "over compiled torch, static cache", "over the same, cut to the context"
OVER_BF16, OVER_Q8_0 = "over llama.cpp BF16", "int8 weights over llama.cpp Q8_0"


def test_met_and_missed_targets() -> None:
    rows = [row("GPT-B", 1, EAGER, 70), row("GPT-B", 1, STATIC, 18), row("GPT-B", 1, OURS, 10, 0.8)]
    found = states(rows)
    assert (found[CASE, OVER_EAGER], found[CASE, OVER_STATIC], found[CASE, OVER_CUT]) == ("met", "met", "not measured")
    assert found[CASE, LIMIT] == "met" and found[CASE, "int8 weights over bf16"] == "not measured"
    found = states([*rows, row("GPT-B", 1, INT8, 5), row("GPT-B", 1, CUT, 12)])
    assert found[CASE, "int8 weights over bf16"] == "met" and found[CASE, OVER_CUT] == "missed by 0.50x"
    assert found[CASE, OVER_STATIC] == "met" and states([*rows, row("GPT-B", 1, CUT, 99)])[CASE, OVER_CUT] == "met"
    assert set(states(rows, exercise=True).values()) == {"not measured"}
    assert set(states([]).values()) == {"not measured"} and len(states([])) == 33


def test_llama_cpp_is_held_against_ours_at_the_same_width() -> None:
    ours = [row("GPT-B", 1, OURS, 10), row("GPT-B", 1, INT8, 5)]
    found = states(ours)
    assert found[CASE, OVER_BF16] == found[CASE, OVER_Q8_0] == "not measured"
    found = states([*ours, row("GPT-B", 1, LLAMA_CPP["BF16"], 11), row("GPT-B", 1, LLAMA_CPP["Q8_0"], 4)])
    assert found[CASE, OVER_BF16] == "met" and found[CASE, OVER_Q8_0] == "missed by 0.20x"


def test_the_int8_cache_is_held_against_int8_weights() -> None:
    rows = [row("GPT-B", 16, INT8, 27), row("GPT-B", 16, INT8_CACHE, 20), row("GPT-B", 16, OURS, 60)]
    assert states(rows)["GPT-B, 16 at once", "int8 cache on top of int8 weights"] == "met"


def test_what_beats_its_limit_is_no_figure() -> None:
    rows = [row("GPT-B", 1, OURS, 10, 1.37)]
    assert states(rows)[CASE, LIMIT] == "not measured"
    assert "GPT-B 1, ours: faster than its limit" in report.markdown(content(rows))


def test_a_missed_target_says_where_the_time_goes() -> None:
    told = report.markdown(content([row("GPT-B", 1, EAGER, 20), row("GPT-B", 1, OURS, 10)]))
    line = told[told.index(f"Where the time goes, {CASE}") :]
    assert "ours: 10 ms; the cache 5 ms (limit 1 ms); all else 5 ms" in line
    assert "the greater of weights 5 ms and products 2 ms" in line and "attention 1 ms" in line
    bare = {key: value for key, value in row("GPT-B", 1, OURS, 10).items() if key not in ("phases", "short_step_p50")}
    assert targets_decoding.evidence(content([bare]), CASE) == ["ours: 10 ms"]


def test_the_readmes_table(tmp_path: Path) -> None:
    empty = report_decoding.readme(None)
    assert sum("not measured" in line for line in empty) == 5 + 33
    for folder, more in (("cpu", {}), ("other", {"exercise": True, "device": "other"})):
        (tmp_path / folder).mkdir()
        rows = [row("GPT-B", 1, EAGER, 70), row("GPT-B", 1, STATIC, 16), row("GPT-B", 1, OURS, 8, 0.8)]
        write_json(tmp_path / folder / "x.json", content(rows, **more))
    (found,) = readme.newest_decoding(tmp_path)
    assert found["device"] == "CPU" and readme.newest(tmp_path) == []
    told = readme.decoding([found])
    assert "CPU, 2 cores, 2 threads" in told and "512 slots of context" in told
    line = next(line for line in told.splitlines() if line.startswith("| GPT-B, 1 image "))
    skip = ["not measured"]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["70 ms", "16 ms", *skip, "8 ms", *skip, *skip, "6.4 ms (80 %)", "5"]
    assert "llama.cpp BF16 |" not in told.split("| target")[0] and "docs/results/decoding.md" in told
    assert "Where the time goes, GPT-B" not in told
    page = report_page.section([found])
    assert page.count("Where the time goes, ") == 1 and "- ours: 8 ms; " in page and "CPU, 2 cores" in page
    assert "Not measured." in report_page.section([])
    found["decoding"]["rows"].append(row("GPT-B", 1, LLAMA_CPP["BF16"], 12))
    told = readme.decoding([found])
    assert "| cut to the context | llama.cpp BF16 | ours" in told and "| 12 ms " in told
    assert "llama.cpp Q8_0 |" not in told.split("| target")[0]
