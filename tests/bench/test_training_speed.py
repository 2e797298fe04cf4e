"""Training speed: an exercise of all of it, a clone made here in LlamaGen's place, tables and targets."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.bench import report_training, targets_training, training, training_speed
from retinar.bench.baselines.plain_gpt import PlainGPT
from retinar.bench.baselines.upstream_training import Loop, random_batch
from retinar.bench.deadline import Deadline
from retinar.bench.targets_training import LLAMAGEN, OURS, PLAIN
from retinar.bench.training_contenders import SIZES, Theirs, training_config
from retinar.bench.training_speed import TrainingSpeed
from retinar.engine.config import GPTConfig, gpt_config
from retinar.engine.errors import InputError
from retinar.engine.files import write_json
from retinar.engine.model import GPT, to_upstream_state_dict

TINY = SIZES["exercise"]

# What the loop asks of a clone, with as many parameters as ours.
GPT_FILE = """
    from dataclasses import dataclass
    import torch

    print("a clone may print what it likes")

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
        token_dropout_p: float = 0.5
        attn_dropout_p: float = 0.5
        resid_dropout_p: float = 0.5
        ffn_dropout_p: float = 0.5
        drop_path_rate: float = 0.5

    class Transformer(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            assert (args.token_dropout_p, args.attn_dropout_p, args.drop_path_rate) == (0.1, 0.0, 0.0)
            self.block_size = args.block_size
            self.output = torch.nn.Linear(args.dim, args.vocab_size, bias=False)
            self.rest = torch.nn.Parameter(torch.ones({parameters} - args.dim * args.vocab_size))
            self.output.weight.data.zero_()

        def forward(self, idx, cond_idx, targets):
            assert self.training and idx.shape == (len(cond_idx), self.block_size - 1)
            hidden = self.rest[: self.output.in_features] + 0 * self.rest.sum()
            logits = self.output(hidden.expand(*targets.shape, -1)).float()
            return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def clone(folder: Path) -> Path:
    models = folder / "autoregressive" / "models"
    models.mkdir(parents=True)
    (models / "gpt.py").write_text(textwrap.dedent(GPT_FILE).replace("{parameters}", str(TINY.config.parameter_count)))
    (models / "generate.py").write_text("")
    return folder


def exercise(out: Path, upstream: Path | None = None, minutes: float = 5.0) -> dict[str, Any]:
    said: list[str] = []
    path, content = training_speed.measure(out, TINY, "cpu", upstream, minutes, exercise=True, say=said.append)
    assert path.parent.parent == out and path.is_file() and said[0].startswith(OURS)
    return content


def rows_of(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row for row in content["training"]["rows"]}


def check_row(row: dict[str, Any]) -> None:
    assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"] and row["turns"] == row["steps"] == 2
    assert row["tokens_per_s"] == pytest.approx(2 * 9 / row["seconds"])
    assert row["flops_per_s"] == pytest.approx(row["flops"] / row["seconds"]) and 0 < row["mfu"] < 1
    assert row["first_loss"] == pytest.approx(math.log(64), rel=0.02) and row["last_loss"] < row["first_loss"]
    assert row["peak_bytes"] is None and not row["compiled"]


def test_without_a_clone_a_loop_like_its_own_stands_in(tmp_path: Path) -> None:
    content = exercise(tmp_path)
    assert content["tests"]["failed"] == [] and content["training"]["absent"] == []
    rows = rows_of(content)
    assert {name: row["baseline"] for name, row in rows.items()} == {OURS: False, PLAIN: True}
    for row in rows.values():
        check_row(row)
    assert rows[OURS]["flops"] == rows[PLAIN]["flops"] > 0
    told = "\n".join(report_training.lines(content))
    assert len(rows[OURS]["all_cpu_seconds"]) == 2 and min(rows[OURS]["all_cpu_seconds"]) > 0
    assert f"x the speed of {PLAIN} (" in told and "both eager" in told and "| ours " in told and "target" not in told


def test_the_clones_model_is_stepped_in_its_own_process(tmp_path: Path) -> None:
    content = exercise(tmp_path / "out", clone(tmp_path / "clone"))
    assert content["tests"]["failed"] == [] and content["training"]["absent"] == []
    rows = rows_of(content)
    assert list(rows) == [OURS, LLAMAGEN]
    check_row(rows[LLAMAGEN])


def test_another_model_than_ours_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Process:
        def measure(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
            asked.append(job)
            return {"loss": 4.0, "parameters": 5000, "warm_up_seconds": 1.0} if len(asked) == 1 else {"error": "gone"}

    process: Any = Process()
    with pytest.raises(RuntimeError, match="its model has 5000 parameters, ours"):
        Theirs(process, TINY, "cpu", True, Deadline(1.0))
    with pytest.raises(RuntimeError, match="gone"):
        Theirs(process, TINY, "cpu", True, Deadline(1.0))
    assert asked[0]["compile"] and asked[0]["threads"] == torch.get_num_threads()
    assert asked[0]["model"]["resid_dropout_p"] == 0.1 and asked[0]["model"]["n_layer"] == 2


def test_a_baseline_that_fails_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("no memory\nmore")

    speed = TrainingSpeed(TINY, "cpu", None, Deadline(60.0), lambda _: None)
    monkeypatch.setattr(speed, "_contenders", lambda compiled: iter([(PLAIN, fail), (OURS, fail)]))
    speed.run()
    absent = {"compiled": False, "reason": "RuntimeError: no memory"}
    assert speed.absent == [{"backend": PLAIN, **absent}, {"backend": OURS, **absent}] and speed.rows == []
    assert speed.wrong == [f"{OURS}: RuntimeError: no memory"]
    found = {**result("A CPU", "2026-01-01", [], kind="cpu"), "training": speed.content()}
    assert f"absent: {PLAIN}, eager: RuntimeError: no memory" in report_training.lines(found)


@pytest.mark.parametrize("groups", [None, 1])
def test_the_stand_in_is_the_same_model(groups: int | None) -> None:
    config = GPTConfig(**{**TINY.config.to_dict(), "n_kv_head": groups})
    torch.manual_seed(0)
    ours, plain = GPT(config).eval(), PlainGPT(config).eval()
    torch.nn.init.normal_(ours.output.weight, std=0.5)
    plain.load_state_dict(to_upstream_state_dict(ours.state_dict()))
    codes_BN, labels_B = torch.randint(64, (3, 9)), torch.tensor([0, 1, 2])
    logits_BNV, loss = plain(idx=codes_BN[:, :-1], cond_idx=labels_B, targets=codes_BN)
    assert torch.allclose(logits_BNV, ours(codes_BN, labels_B), atol=1e-5)
    assert loss.item() == pytest.approx(ours.loss(codes_BN, labels_B).item(), rel=1e-6)


def test_its_loop_clips_decays_and_steps_as_adamw_does() -> None:
    """The first step moves every matrix by lr (m / sqrt(v) is one) and decays it."""
    torch.manual_seed(0)
    config = TINY.config
    model = PlainGPT(config)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    batch = random_batch(2, {"vocab_size": 64, "block_size": 9, "num_classes": 2})
    loop = Loop(model, *batch, device="cpu", precision="fp32", compiled=False, wrapped=False)
    found = loop.turn(steps=1, uncounted=0)
    assert found["loss"] == pytest.approx(math.log(64), rel=1e-6) and found["peak_bytes"] is None
    moved = model.output.weight.detach() - before["output.weight"] * (1 - 1e-4 * 0.05)
    assert float(moved.abs().max()) == pytest.approx(1e-4, rel=1e-3)
    assert all(each.grad is None for each in model.parameters())


class Fake:
    """A contender that notes when it had a turn."""

    warm_up_seconds = 0.1
    first_loss = math.log(64)

    def __init__(self, name: str, turns: list[str], loss: float = 3.0) -> None:
        self.name, self.turns, self.loss = name, turns, loss

    def turn(self, steps: int, uncounted: int) -> dict[str, Any]:
        self.turns.append(self.name)
        return {"seconds": float(len(self.turns)), "cpu_seconds": 1.0, "loss": self.loss, "peak_bytes": 1}

    def close(self) -> None:
        self.turns.append(f"{self.name} closed")


def race(monkeypatch: pytest.MonkeyPatch, seconds: float = 600.0, **changes: Any) -> tuple[TrainingSpeed, list[str]]:
    turns: list[str] = []
    speed = TrainingSpeed(dataclasses.replace(TINY, turns=3, **changes), "cpu", None, Deadline(seconds), lambda _: None)
    makers = [("a", lambda: Fake("a", turns)), ("b", lambda: Fake("b", turns, loss=5.0))]
    monkeypatch.setattr(speed, "_contenders", lambda compiled: iter(makers))
    monkeypatch.setattr(training_speed, "matmul_flops_per_s", lambda device, precision: 1e9)
    speed.run()
    return speed, turns


def test_who_is_first_changes_with_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    speed, turns = race(monkeypatch, compiled=(False, True))
    assert turns[:6] == ["b", "a", "a", "b", "b", "a"] and turns[6:8] == ["b closed", "a closed"]
    assert [(row["backend"], row["compiled"]) for row in speed.rows] == [
        ("a", False), ("b", False), ("a", True), ("b", True)
    ]  # fmt: skip
    assert speed.rows[0]["seconds"] == 3.0 and speed.content()["matmul_flops_per_s"] == 1e9  # of 2, 3 and 6
    assert speed.wrong == [
        "b does not train: loss 4.159 at the first step, 5.000 at the last",
        "b, compiled does not train: loss 4.159 at the first step, 5.000 at the last",
    ]


def test_what_does_not_fit_into_the_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    speed, turns = race(monkeypatch, seconds=0.0)
    assert turns[:2] == ["b", "a"] and [row["turns"] for row in speed.rows] == [1, 1]


def result(device: str, date: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    head = {"format": 2, "device": device, "kind": "cuda", "cores": 8, "threads": 8, "torch": "2.11", "date": date}
    head |= {"commit": "abc", "command": "train", "tests": {"failed": []}, "rows": [], "limits": {}}
    about = {"model": "GPT-XL", "parameters": 775_000_000, "images": 32, "codes": 1024, "precision": "bf16"}
    found = {**about, "matmul_flops_per_s": 8e14, "rows": rows, "absent": []}
    return {**head, "training": found, **more}


def row(backend: str, seconds: float, mfu: float, compiled: bool = True) -> dict[str, Any]:
    times = {
        "seconds": seconds,
        "all_seconds": [seconds, 2 * seconds],
        "all_cpu_seconds": [1.0, 1.0],
        "fastest": seconds,
        "slowest": seconds,
        "warm_up_seconds": 60.0,
    }
    common = {"tokens_per_s": 32768 / seconds, "peak_bytes": 2**36}
    return {"backend": backend, "compiled": compiled, "mfu": mfu, **times, **common}


def test_targets_are_for_the_papers_model_on_a_gpu(tmp_path: Path) -> None:
    rows = [row(OURS, 0.5, 0.4), row(LLAMAGEN, 0.7, 0.3), row(OURS, 0.8, 0.3, False), row(LLAMAGEN, 0.8, 0.3, False)]
    content = result("H200", "2026-01-01", rows)
    states = [(each["shown"], each["state"]) for each in targets_training.evaluate(content)]
    assert states == [("40 %", "missed by 10 %"), ("1.40x", "met")]
    told = report_training.lines(content)
    assert "- both eager: 1.00x the speed of LlamaGen's loop" in told and any("64.0 GiB" in line for line in told)
    for other in ({**content, "kind": "cpu"}, {**content, "exercise": True}, None):
        assert {each["state"] for each in targets_training.evaluate(other)} == {"not measured"}
    drifting = [{**rows[0], "all_seconds": [1.0, 2.0, 9.0]}, {**rows[1], "all_seconds": [2.0, 2.0, 9.0]}]
    assert targets_training.ratio(drifting, LLAMAGEN, True) == 1.0  # of 2, 1 and 1
    assert targets_training.evaluate(result("H200", "2026-01-01", rows[:1]))[1]["state"] == "not measured"
    write_json(_file(tmp_path, "h200", "1"), content)
    write_json(_file(tmp_path, "h200", "2"), result("H200", "2026-02-01", rows))
    write_json(_file(tmp_path, "cpu", "1"), result("A CPU", "2026-03-01", rows, kind="cpu"))
    write_json(_file(tmp_path, "cpu", "2"), result("A CPU", "2026-04-01", rows, kind="cpu", exercise=True))
    newest = report_training.newest(tmp_path)
    assert [(each["device"], each["date"]) for each in newest] == [("H200", "2026-02-01"), ("A CPU", "2026-03-01")]
    page = tmp_path / "training.md"
    page.write_text(f"before\n{report_training.BEGIN}old{report_training.END}\nafter\n")
    assert report_training.update(page, tmp_path) == page
    text = page.read_text()
    assert text.startswith(f"before\n{report_training.BEGIN}\n\n| target") and text.endswith("\nafter\n")
    assert text.count("1.40x the speed") == 2 and text.count("missed by 10 %") == 1 and "A CPU, 8 cores" in text
    assert "old" not in text.replace("Threshold", "")
    report_training.update(page, tmp_path)
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(InputError, match="put them back"):
        report_training.update(page, tmp_path)
    assert report_training.section([]).count("not measured") == 2


def _file(folder: Path, device: str, name: str) -> Path:
    (folder / device).mkdir(exist_ok=True)
    return folder / device / f"{name}.json"


def test_the_config_is_upstreams_default() -> None:
    config = training_config(SIZES["cpu"], "cpu", True)
    assert (config.batch_size, config.compile, config.precision, config.ema_decay) == (4, True, "bf16", None)
    assert config.model == gpt_config("GPT-B", vocab_size=16384, num_classes=1000, grid=32)
    assert (config.model.attn_dropout_p, config.model.resid_dropout_p) == (0.0, 0.1)
    assert (config.optim.weight_decay, config.optim.betas, config.optim.grad_clip) == (0.05, (0.9, 0.95), 1.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--exercise", "--out", str(tmp_path)]
    assert training.main([*flags, "--turns", "1"]) == 0
    assert "| ours " in capsys.readouterr().out
    for wrong, said in ((["--images", "0"], "--images of at least 1"), (["--upstream", str(tmp_path)], "LlamaGen")):
        assert training.main([*flags, *wrong]) == 2
        told = capsys.readouterr()
        assert said in told.err and told.err.count("\n") == 1 and told.out == ""
