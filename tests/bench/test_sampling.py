"""Sampling as it is measured: every row, what is absent, what is late, the trace of a step."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.bench import check_phase, sampling, sampling_baselines, trace
from retinar.bench.baselines import static_cache
from retinar.bench.deadline import Deadline
from retinar.bench.sampling import Sampling, decode
from retinar.bench.sampling_sizes import INVARIANT, OURS, REFERENCE, SIZES, STATIC, TO_PNG, UPSTREAM, make_gpt
from retinar.bench.timing import Limits
from retinar.bench.whole import Run
from retinar.engine.progress import silent
from retinar.kernels import ops

SIZE = SIZES["exercise"]
LIMIT = Limits(1e9, 1e10)


def bench(folder: Path, **options: Any) -> Sampling:
    return Sampling("cpu", SIZE, LIMIT, Deadline(600.0), folder / "x-step.json.gz", exercise=True, **options)


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Sampling:
    """All of it, without a clone of LlamaGen; ``changed`` was called after every measurement."""
    one = bench(tmp_path_factory.mktemp("sampling"))
    states: list[int] = []
    one.run(lambda: states.append(len(one.rows)))
    assert states == sorted(states) and states[-1] == len(one.rows)
    return one


@pytest.mark.both_runs
def test_everything_is_measured_or_absent_with_its_reason(done: Sampling) -> None:
    assert done.wrong == [] and done.left_out == []
    rows = {(row["backend"], row["images"]): row for row in done.rows}
    wanted = {(OURS, 1), (OURS, 2), (INVARIANT, 1), (REFERENCE, 1), (STATIC, 1), (TO_PNG, 1)}
    assert set(rows) == wanted
    upstream = {(name, images) for name in UPSTREAM.values() for images in SIZE.upstream}
    assert set(done.absent) == upstream and all("--upstream" in reason for reason in done.absent.values())
    whole = rows[OURS, 2]
    assert whole["steps"] == whole["codes"] == SIZE.config.block_size and not whole["extrapolated"]
    assert 0 < whole["step_p50"] <= whole["step_p99"] and sum([whole["step_mean"]] * 9) <= whole["seconds"] * 1.01
    assert whole["peak_bytes"] is None and whole["graph_bytes"] is None
    assert whole["implementation"]["backend"] == ops.preferred("decode_step", "cpu")
    assert [row["baseline"] for row in done.rows] == [row["backend"] in (REFERENCE, STATIC) for row in done.rows]
    assert rows[REFERENCE, 1]["extrapolated"] and rows[STATIC, 1]["extrapolated"]
    assert rows[TO_PNG, 1]["kept_up"] > 0 and rows[TO_PNG, 1]["images_per_s"] == 1 / rows[TO_PNG, 1]["seconds"]
    json.dumps(done.content())


@pytest.mark.interpreted
def test_a_step_is_our_kernels_and_its_trace_shows_them(done: Sampling) -> None:
    step = done.content()["step"]
    assert step["missing"] == step["replaced"] == []
    assert (step["images"], step["position"], step["trace"]) == (1, 4, "x-step.json.gz")
    assert {each["op"] for each in step["kernels"]} >= {"linear", "paged_attention", "cfg_sample", "decode_step"}
    calls = {each["name"]: each["calls"] for each in step["kernels"]}
    assert calls["cfg_sample"] == 1 and calls["linear"] == 4 * SIZE.config.n_layer + 1
    groups = {each["group"]: each["share"] for each in step["groups"]}
    assert {"matrix products", "attention", "sampling", "embedding"} <= set(groups)
    assert sum(groups.values()) == pytest.approx(1) and groups["matrix products"] > groups["embedding"]
    names = {event.get("name") for event in events(done.path)}
    assert {"linear", "cfg_sample"} <= names and done.path.stat().st_size == step["trace_bytes"] < 2**20


def test_the_trace_of_the_references(done: Sampling) -> None:
    """Without our kernels the trace is of what runs instead, and that they are missing is no mistake."""
    assert any(event.get("name") == "aten::mm" for event in events(done.path))
    assert done.step is not None and done.step["missing"] == ["cfg_sample", "decode_step", "linear", "paged_attention"]


def test_a_trace_that_is_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LARGEST", 100)
    path = tmp_path / "step.json.gz"
    found = trace.step_profile(lambda: torch.ones(2).add(1), "cpu", path)
    assert found["trace"] is None and not path.exists() and found["trace_bytes"] > 100
    assert len(found["left_out"]) == 1 and "trace" in found["left_out"][0]


def test_work_that_our_kernels_should_do_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "preferred", lambda op, device: "triton")
    call = lambda: torch.ones(2, 2).softmax(-1) @ torch.ones(2, 2)  # noqa: E731
    told = trace.step_profile(call, "cpu", tmp_path / "a.json.gz")["wrong"]
    assert "a decode step uses no kernel of paged_attention" in told
    assert "a decode step runs aten::mm beside our kernels" in told
    assert any("softmax" in sentence for sentence in told)
    told = trace.step_profile(call, "cpu", tmp_path / "b.json.gz", blas=True)["wrong"]
    assert not any("linear" in sentence or "aten::mm" in sentence for sentence in told)
    assert any("softmax" in sentence for sentence in told)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    one = Sampling("cpu", SIZE, LIMIT, Deadline(0.0), tmp_path / "t.json.gz", upstream=tmp_path)
    one.run()
    assert one.rows == [] and one.wrong == []
    (told,) = one.left_out
    assert told.startswith("sampling, for lack of time: ours (1 image), ours (2 images), ours, batch invariant")
    assert f"{STATIC} (1 image)" in told and f"{TO_PNG} (1 image)" in told
    assert f"{UPSTREAM['eager']} (1 images)" in told and f"{UPSTREAM['compile']} (2 images)" in told


def test_a_measurement_is_asked_for_only_when_it_fits() -> None:
    size = SIZES["cuda"]
    one = Sampling("cpu", size, Limits(4.3e12, 8e14), Deadline(60.0), Path("t"))
    assert one.guess(1) < one.guess(8) < one.guess(64) < one.guess(256) < 100
    names = [(job.name, job.images) for job in one.jobs()]
    assert names[:5] == [(OURS, 1), (OURS, 64), (OURS, 8), (OURS, 256), (INVARIANT, 256)]
    assert [name for name, _ in names[8:]] == [REFERENCE, REFERENCE, STATIC, STATIC, TO_PNG]


def test_a_baseline_that_fails_is_absent_and_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(sampling, "decode", fails)
    monkeypatch.setattr(sampling_baselines, "runner_window", fails)
    monkeypatch.setattr(static_cache, "disagrees", lambda *_: "its logits differ")
    monkeypatch.setattr(sampling.sampling_images, "jobs", lambda bench: iter(()))
    one = bench(tmp_path)
    one.run()
    assert [sentence.split(":")[0] for sentence in one.wrong] == [
        "ours (1 image) could not be sampled",
        "ours (2 images) could not be sampled",
        "ours, batch invariant (1 image) could not be sampled",
    ]
    assert one.absent[REFERENCE, 1] == "RuntimeError: no such" and one.absent[STATIC, 1] == "its logits differ"


def test_without_a_checked_step_ours_has_no_speed(tmp_path: Path) -> None:
    every = {(spec.name, "reference") for spec in check_phase.chosen("sampling")}
    every |= {("paged_attention", "sdpa")}
    assert {name for name, _ in every} == {"linear", "paged_attention", "cfg_sample", "decode_step"}
    assert check_phase.unchecked(every, "cpu", torch.float32) is None
    reason = check_phase.unchecked(every - {("decode_step", "reference")}, "cpu", torch.float32)
    assert reason == "wrong on this device, or not checked: decode_step (reference)"
    one = bench(tmp_path, unchecked=reason)
    one.run()
    assert {row["backend"] for row in one.rows} == {REFERENCE, STATIC} and one.wrong == []
    assert one.absent[OURS, 1] == one.absent[INVARIANT, 1] == one.absent[TO_PNG, 1] == reason


def test_too_small_a_cache_is_absent_and_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinar.engine.decoding.pool_pages", lambda wanted, least, *_: least)
    one = bench(tmp_path)
    one.gpt = make_gpt(SIZE, "cpu")
    for job in one.jobs():
        if (job.name, job.images) == (OURS, 2):
            one._run(job)
    assert one.wrong == [] and "2 images at once" in one.absent[OURS, 2]


def test_the_decode_is_timed_from_the_first_submission_to_the_last_code(tmp_path: Path) -> None:
    one = bench(tmp_path)
    one.gpt = make_gpt(SIZE, "cpu")
    sampler = one.sampler(backend="reference")
    requests = one.requests(sampler, 3)
    assert [request.label for request in requests] == [0, 1, 0] and requests[0].params.cfg_scale == 2.0
    loop = one.loop(sampler, requests)
    found = decode(loop, requests, "cpu")
    assert len(found.seconds) == SIZE.config.block_size and found.whole is not None
    assert found.whole >= sum(found.seconds) and not loop.scheduler.busy
    assert loop.scheduler.allocator.free == loop.runner.cache.pages  # those that warmed up were cancelled


def test_the_random_model_has_no_zeros_to_multiply_with() -> None:
    gpt = make_gpt(SIZE, "cpu")
    assert bool(gpt.output.weight.std() > 0.01) and not gpt.training
    assert not any(parameter.requires_grad for parameter in gpt.parameters())


def test_sampling_alone_writes_its_result_and_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(one: Sampling) -> Any:
        return (job for job in _jobs(one) if (job.name, job.images) == (OURS, 1))

    _jobs = Sampling.jobs
    monkeypatch.setattr(Sampling, "jobs", short)
    run = Run("cpu", tmp_path, Deadline(60.0), exercise=True, seconds=0.0, only="sampling", progress=silent)
    run.limits[torch.float32] = LIMIT
    content = run.all()
    assert content["tests"]["passed"] and content["only"] == "sampling" and content["tests"]["checked"] > 0
    assert [row["backend"] for row in content["sampling"]["rows"]] == [OURS]
    assert run.path is not None and json.loads(run.path.read_text())["sampling"]["rows"]
    beside = run.path.with_name(content["sampling"]["step"]["trace"])
    assert beside.name == f"{run.path.stem}-step.json.gz" and events(beside)
    assert list(tmp_path.glob("*/*.json")) == [run.path]  # the trace is not taken for a result


def test_the_phases_before_it_leave_it_time() -> None:
    now = [0.0]
    run = Run("cuda", Path("x"), Deadline(510.0, lambda: now[0]))
    assert run.kept == 150 and run.deadline.part(1.0, run.kept).left == 360
    now[0] = 400.0
    assert run.deadline.part(1.0, run.kept).left == 0 and run.deadline.left == 110
    assert Run("cuda", Path("x"), Deadline(1.0), only="swiglu").kept == 0
