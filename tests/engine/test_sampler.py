"""The sampler's door and its promise: an image depends on its own request and on nothing else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinar.engine.config import TokenizerConfig
from retinar.engine.errors import InputError
from retinar.engine.model import GPT
from retinar.engine.philox import Stream, stream
from retinar.engine.progress import SilentBar
from retinar.engine.request import SamplingParams, make_request, resolve_label
from retinar.engine.sampler import Sampler
from retinar.engine.tokenizer import VQTokenizer
from retinar.kernels import ops

LABELS = ["healthy", "npdr", 0, 1, "npdr", "healthy", "1", "0"]


def same(first: list, second: list) -> bool:
    return all(
        a.info == b.info and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def alone(tiny_gpt: GPT, tiny_tokenizer: VQTokenizer) -> list:
    sampler = Sampler(tiny_gpt, tiny_tokenizer, classes=("healthy", "npdr"), device="cpu")
    return [sampler.generate([label], seed=5, start_index=i, max_images=1)[0] for i, label in enumerate(LABELS)]


@pytest.mark.parametrize(("max_images", "page_size", "pages"), [(8, 16, None), (3, 1, None), (8, 1024, 4), (8, 4, 40)])
def test_pixels_do_not_depend_on_the_batch(
    tiny_sampler: Sampler, alone: list, max_images: int, page_size: int, pages: int | None
) -> None:
    made = tiny_sampler.generate(LABELS, seed=5, max_images=max_images, page_size=page_size, pages=pages)
    assert same(made, alone)


def test_order_does_not_matter(tiny_sampler: Sampler, alone: list) -> None:
    requests = tiny_sampler.requests(LABELS, SamplingParams(), seed=5)
    for done in tiny_sampler.sample(requests[::-1], max_images=3):
        assert done.fields == alone[done.request.index].info
        assert np.array_equal(done.pixels_HWC, np.asarray(alone[done.request.index]))


def test_images_differ_by_seed_index_label_and_parameters(tiny_sampler: Sampler) -> None:
    def codes(index: int = 0, label: int = 0, seed: int = 0, **params: float) -> tuple[int, ...]:
        request = make_request(index, label, SamplingParams(**params), seed)  # type: ignore[arg-type]
        return tuple(next(tiny_sampler.sample_codes([request]))[1].tolist())

    drawn = [codes(), codes(index=1), codes(label=1), codes(seed=1), codes(cfg_scale=1.0), codes(temperature=0.5)]
    drawn += [codes(top_k=3), codes(top_p=0.5), codes(cfg_interval=4), codes(seed=2**63)]
    assert len(set(drawn)) == len(drawn)
    assert codes() == codes()


def test_unguided_is_one_row_and_equals_any_scale_up_to_one(tiny_sampler: Sampler) -> None:
    first, second = (tiny_sampler.generate([0], cfg_scale=scale)[0] for scale in (1.0, 0.3))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_guidance_over_all_steps_is_the_interval_that_covers_them(tiny_sampler: Sampler) -> None:
    first, second, third = (tiny_sampler.generate([0], cfg_interval=k)[0] for k in (-1, 34, 33))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert first.info["codes"][:-4] == third.info["codes"][:-4]  # only the last draw was not guided


def test_images_of_the_right_size_with_metadata(alone: list) -> None:
    assert alone[1].size == (12, 12) and alone[1].mode == "RGB"
    info = alone[1].info
    assert info["label"] == "npdr" and info["class"] == "1" and info["index"] == "1" and info["seed"] == "5"
    assert info["checkpoint"] == "unsaved" and info["dtype"] == "float32" and info["synthetic"] == "true"
    assert info["parameters"] == (
        '{"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_interval": -1}'
    )


def test_codes_come_as_they_complete_and_belong_to_the_caller(tiny_sampler: Sampler) -> None:
    # the second has no null row, and with one pair's pages the first must be done before it
    requests = [make_request(i, 0, SamplingParams()) for i in (7, 3)]
    made = list(tiny_sampler.sample_codes(requests, pages=6))
    assert [index for index, _ in made] == [7, 3]
    made[0][1][0] = 5  # an ordinary tensor, not one of inference mode
    assert made[0][1].shape == (36,) and made[0][1].dtype == torch.int64


def test_two_runs_at_once_do_not_share_a_cache(tiny_sampler: Sampler) -> None:
    requests = tiny_sampler.requests([0] * 6, SamplingParams(), seed=9)
    expected = dict(tiny_sampler.sample_codes(requests))
    first, second = (tiny_sampler.sample_codes(requests, max_images=2) for _ in range(2))
    made: dict[int, torch.Tensor] = {}
    for (index, codes_T), (_, other_T) in zip(first, second, strict=True):
        assert torch.equal(codes_T, other_T)
        made[index] = codes_T
    assert all(torch.equal(made[index], codes_T) for index, codes_T in expected.items())


def test_a_run_left_unfinished_harms_nothing(tiny_sampler: Sampler, alone: list) -> None:
    for _ in tiny_sampler.sample_codes(tiny_sampler.requests([0] * 9, SamplingParams()), max_images=2):
        break
    assert same(tiny_sampler.generate(LABELS, seed=5), alone)


def test_bfloat16_runs_and_says_so(tiny_gpt: GPT, tiny_tokenizer: VQTokenizer) -> None:
    sampler = Sampler(tiny_gpt, tiny_tokenizer, device="cpu", dtype=torch.bfloat16)
    first = sampler.generate([0, 1, 1], page_size=4)
    assert first[0].info["dtype"] == "bfloat16" and first[0].info["label"] == "0"
    assert same([sampler.generate([1], start_index=2)[0]], first[2:])


def test_progress_counts_codes(tiny_sampler: Sampler) -> None:
    bars: list[SilentBar] = []

    def progress(label: str, total: int | None) -> SilentBar:
        bars.append(SilentBar(label, total))
        return bars[-1]

    tiny_sampler.generate([0, 1, 0], max_images=2, progress=progress)
    assert (bars[0].done, bars[0].total, bars[0].note) == (108, 108, "3 of 3 images")
    assert {bar.label for bar in bars[1:]} <= {"decoding images"} and all(bar.done == bar.total for bar in bars)


def test_from_pretrained_is_the_same_sampler(tiny_checkpoint: Path, alone: list) -> None:
    made = Sampler.from_pretrained(tiny_checkpoint, device="cpu").generate(LABELS, seed=5)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(made, alone, strict=True))
    assert len(made[0].info["checkpoint"]) == len(made[0].info["tokenizer"]) == 64


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"cfg_scale": math.nan}, "cfg-scale must be a number from 0 to a million .* got nan"),
        ({"cfg_scale": math.inf}, "cfg-scale .* got inf"),
        ({"cfg_scale": 1e39}, "cfg-scale .* got 1e\\+39"),
        ({"cfg_scale": -0.5}, "cfg-scale .* got -0.5"),
        ({"cfg_scale": "2"}, "cfg_scale|cfg-scale must be a number, got '2'"),
        ({"temperature": -1.0}, "temperature .* got -1.0"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"top_k": -1}, "top-k .* got -1"),
        ({"top_k": 2.5}, "top-k must be a whole number, got 2.5"),
        ({"top_k": math.nan}, "top-k must be a whole number, got nan"),
        ({"top_k": True}, "top-k must be a whole number, got True"),
        ({"top_p": 0.0}, "top-p .* got 0.0"),
        ({"top_p": 1.01}, "top-p .* got 1.01"),
        ({"top_p": math.nan}, "top-p .* got nan"),
        ({"cfg_interval": -2}, "cfg-interval .* got -2"),
        ({"seed": -1}, "seed must lie .* got -1"),
        ({"seed": 2**64}, "seed must lie"),
        ({"start_index": -1}, "index must lie .* got -1"),
        ({"start_index": 2**32}, "index must lie"),
        ({"labels": []}, "at least one label"),
        ({"labels": "healthy"}, "a list with at least one label, got 'healthy'"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"labels": ["dme"]}, "unknown label 'dme': this checkpoint knows healthy, npdr"),
        ({"labels": [2]}, "unknown label 2"),
        ({"labels": [-1]}, "unknown label -1"),
        ({"labels": [True]}, "unknown label True"),
        ({"max_images": 0}, "max-images must be at least 1, got 0"),
        ({"page_size": 3}, "page-size must be a power of two .* got 3"),
        ({"pages": 0}, "pages must be at least 1, got 0"),
        ({"pages": 5}, "needs 6 pages of 16 slots and the pool has 5"),
    ],
    ids=str,
)
def test_bad_parameters_are_one_sentence(tiny_sampler: Sampler, bad: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tiny_sampler.generate(**({"labels": [0]} | bad))
    assert "\n" not in str(caught.value)


def test_bad_requests_are_refused_before_the_first_image_is_asked_for(tiny_sampler: Sampler) -> None:
    requests = tiny_sampler.requests([0], SamplingParams())
    with pytest.raises(InputError, match="needs 6 pages"):
        tiny_sampler.sample_codes(requests, pages=5)
    assert list(tiny_sampler.sample_codes([])) == []


def test_no_tokenizer_gives_codes_but_no_images(tiny_gpt: GPT) -> None:
    sampler = Sampler(tiny_gpt, device="cpu")
    assert len(list(sampler.sample_codes(sampler.requests([0, 1], SamplingParams())))) == 2
    with pytest.raises(InputError, match=r"no tokenizer.*--tokenizer"):
        sampler.generate([0])


def test_a_tokenizer_of_another_codebook_is_refused(tiny_gpt: GPT) -> None:
    config = TokenizerConfig(ch=32, ch_mult=(1, 1), z_channels=32, codebook_size=128, image_size=12, attention=False)
    with pytest.raises(InputError, match="draws from 64 codes and the tokenizer has 128"):
        Sampler(tiny_gpt, VQTokenizer(config), device="cpu")


def test_guidance_without_a_null_class_is_refused(tiny_gpt: GPT, tiny_tokenizer: VQTokenizer) -> None:
    gpt = GPT(dataclasses.replace(tiny_gpt.config, null_class=False, class_dropout_prob=0.0))
    sampler = Sampler(gpt, tiny_tokenizer, device="cpu")
    with pytest.raises(InputError, match="no null class"):
        sampler.generate([0])
    assert len(sampler.generate([0], cfg_scale=1.0)) == 1


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(tiny_gpt: GPT, device: str) -> None:
    with pytest.raises(InputError, match="device"):
        Sampler(tiny_gpt, device=device)


def test_labels_by_name_and_number() -> None:
    classes = ("healthy", "npdr", "7")
    assert [resolve_label(label, classes, 9) for label in ("npdr", 1, "1", "7", 7, " 8 ")] == [1, 1, 1, 2, 7, 8]
    with pytest.raises(InputError, match="the numbers 0 to 999"):
        resolve_label("cat", (), 1000)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_a_stream_keeps_the_seeds_bits(seed: int, index: int) -> None:
    one = stream(seed, index)
    assert one.seed_word % 2**64 == seed and -(2**63) <= one.seed_word < 2**63


def test_the_codes_are_the_argmax_of_logit_and_the_streams_noise(tiny_gpt: GPT, tiny_sampler: Sampler) -> None:
    params = SamplingParams(cfg_scale=1.0, temperature=0.8)
    codes_T = next(tiny_sampler.sample_codes([make_request(4, 1, params, seed=2**64 - 3)]))[1]
    with torch.no_grad():
        logits_NV = tiny_gpt(codes_T[None], torch.tensor([1]))[0] / 0.8
    noise_NV = torch.stack([Stream(2**64 - 3, 4).noise(position, 64) for position in range(36)])
    assert torch.equal((logits_NV + noise_NV).argmax(-1), codes_T)


def test_step_inputs_are_the_ops_own(tiny_sampler: Sampler) -> None:
    loop = tiny_sampler.loop(tiny_sampler.requests([0], SamplingParams()), max_images=1, page_size=16)
    assert isinstance(loop.batch.inputs, ops.StepInputs)
