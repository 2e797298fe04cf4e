"""A default training step runs on our kernels, and a profile's times are put into the right groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retinar.bench import profile, profile_step, training
from retinar.bench.deadline import Deadline
from retinar.bench.profile import Span
from retinar.kernels import aot, ops

KNOWN = {"swiglu_forward": "swiglu", "rope_attention_backward_q": "rope_attention", "rows": "linear_cross_entropy"}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> torch.profiler.profile:
    """`train.gpt.GPTTask`'s own step by the paper's recipe, tiny."""
    config = training.step_config("cpu")
    assert config.activation_checkpointing == "none" and config.attention_backend == "auto"
    assert config.model.attn_dropout_p == 0.1 and config.precision == "fp32"
    task = training.make_task(config, tmp_path_factory.mktemp("profile") / "codes")
    recorded, seconds, _ = profile_step.record(task, "cpu")
    assert seconds > 0
    return recorded


@pytest.mark.interpreted
def test_every_norm_gate_attention_and_loss_is_our_kernel(step: torch.profiler.profile) -> None:
    expected = profile.expected()
    assert {kernel.op for kernel in aot.kernels() if kernel.name in expected} == set(profile.GROUP_OF_OP)
    missing = expected - profile.kernel_names(step)
    assert not missing, f"a default training step does not launch {sorted(missing)}"


@pytest.mark.interpreted
def test_no_operator_of_torch_does_their_work(step: torch.profiler.profile) -> None:
    assert not profile.replaced(step)
    names = {each.name for each in step.events() or ()}
    assert {"aten::mm", "aten::_fused_adamw_"} <= names  # the profile sees operators


@pytest.mark.interpreted
def test_each_group_has_its_forward_and_its_backward(step: torch.profiler.profile) -> None:
    shown = profile.kernel_names(step)
    for op, group in profile.GROUP_OF_OP.items():
        names = {name for name in shown if profile.ours()[name] == op}
        assert names, group
        if group != "loss":
            assert any("forward" in name for name in names) and any("backward" in name for name in names), group


@pytest.mark.interpreted
def test_a_norm_that_is_not_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ops.rms_norm

    def plain(x: torch.Tensor, weight: torch.Tensor, eps: float, **_: Any) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    monkeypatch.setattr(ops, "rms_norm", plain)
    monkeypatch.setattr(ops, "add_rms_norm", lambda x, r, w, eps: (plain(x + r, w, eps), x + r))
    assert original is not ops.rms_norm
    found = profile_step.profile_step("cpu", Deadline(60))
    assert "rms_norm_forward" in found["missing"] and "rms_norm_backward" in found["missing"]
    assert any("does not use the kernel rms_norm_forward" in sentence for sentence in found["wrong"])
    assert any("beside our kernels" in sentence for sentence in found["wrong"])


@pytest.mark.interpreted
def test_the_profile_says_what_it_is_of(step: torch.profiler.profile) -> None:
    found = profile.describe(step)
    assert found["missing"] == found["replaced"] == []
    groups = {each["group"]: each for each in found["groups"]}
    assert {"norm", "gate", "attention", "loss", "matrix products", "optimizer"} <= set(groups)
    assert sum(each["share"] for each in groups.values()) == pytest.approx(1)
    # The interpreter takes nearly all of the time, and it is put down to the kernels that it runs.
    assert groups["attention"]["share"] > 10 * groups["matrix products"]["share"]
    calls = {each["name"]: each["calls"] for each in found["kernels"]}
    assert calls["rms_norm_forward"] == 3 and calls["swiglu_forward"] == 1  # two norms a layer and the last


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_swiglu_forward", "gate"),
        ("rope_attention_backward_q", "attention"),
        ("rows", "loss"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("aten::mm", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void cunn_SoftMaxForward<4, c10::BFloat16>", "loss"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "other"),
    ],
)
def test_kernels_are_grouped_by_their_names(name: str, group: str) -> None:
    (found,) = profile.summed([Span(name, 1.0)], KNOWN)
    assert found.group == group
    assert (found.op is not None) == (name.strip("_") in KNOWN)


def test_what_runs_inside_a_kernel_is_the_kernels() -> None:
    """The interpreter's own operators; the optimizer's small ones."""
    found = {
        each.name: each
        for each in profile.summed(
            [
                Span("swiglu_forward", 1.0),
                Span("aten::empty", 2.0, ("swiglu_forward", "retinar::swiglu")),
                Span("swiglu_forward", 3.0),
                Span("aten::div_", 0.5, ("Optimizer.step#AdamW.step",)),
            ],
            KNOWN,
        )
    }
    assert set(found) == {"swiglu_forward", "aten::div_"}
    assert found["swiglu_forward"].seconds == 6.0 and found["swiglu_forward"].calls == 2
    assert found["aten::div_"].group == "optimizer"


def test_the_step_is_the_recipes(tmp_path: Path) -> None:
    gpu = training.step_config("cuda")
    assert (gpu.model.n_layer, gpu.model.dim, gpu.batch_size, gpu.precision) == (36, 1280, 8, "bf16")
    assert gpu.compile and not training.step_config("cuda", compile_layers=False).compile
    small = training.step_config("cpu")
    dropouts = ("token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob")
    assert {getattr(config.model, name) for config in (gpu, small) for name in dropouts} == {0.1}
    assert gpu.optim == small.optim
    codes = training.random_codes(small, tmp_path / "codes")
    assert len(codes) == small.batch_size and codes.vocab_size == small.model.vocab_size


def test_a_step_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(profile_step, "_profile", fails)
    found = profile_step.profile_step("cuda", Deadline(1000))
    assert [sentence.split(" training step")[0] for sentence in found["wrong"]] == ["the compiled", "the uncompiled"]
    assert len(profile_step.profile_step("cuda", Deadline(10))["wrong"]) == 1  # too little time to compile
