"""``sample_c2i_ddp``: upstream's files from our sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from retinar.engine import provenance
from retinar.engine.checkpoint import file_weights, load_tokenizer, save_gpt
from retinar.engine.config import GPTConfig, gpt_config
from retinar.engine.images import to_bytes
from retinar.engine.model import GPT
from retinar.train.upstream import sample_c2i_ddp
from retinar.train.upstream.gpt_sampler import EvalSampler
from tests.train.processes import run_processes
from tests.train.upstream_world import GRID, SIZE, pictures, write_tokenizer

NAME = f"GPT-B-gpt-size-{SIZE}-size-40-VQ-8-topk-0-topp-1.0-temperature-1.0-cfg-1.5-seed-3"


class Places:
    def __init__(self, root: Path) -> None:
        self.gpt, self.vq = root / "gpt", root / "vq.pt"
        write_tokenizer(self.vq)
        torch.manual_seed(1)
        model = GPT(GPTConfig(n_layer=2, n_head=2, dim=32, multiple_of=32, vocab_size=32, num_classes=3, grid=GRID))
        model.output.weight.data.normal_()
        save_gpt(self.gpt, model, classes=("a", "b", "c"))
        self.whole = root / "whole"
        assert sample_c2i_ddp.main(self.flags(self.whole)) == 0

    def flags(self, out: Path, *more: str) -> list[str]:
        return [
            *("--gpt-ckpt", str(self.gpt), "--vq-ckpt", str(self.vq), "--vq-model", "VQ-8", "--downsample-size", "8"),
            *("--image-size", str(SIZE), "--image-size-eval", "40", "--num-fid-samples", "5", "--global-seed", "3"),
            *("--precision", "none", "--sample-dir", str(out), *more),
        ]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of torchrun
    try:
        return Places(tmp_path_factory.mktemp("sample"))
    finally:
        torch.set_num_threads(before)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_upstreams(places: Places) -> None:
    found = pictures(places.whole / NAME)
    assert list(found) == [f"{index:06d}.png" for index in range(5)]
    with np.load(places.whole / f"{NAME}.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (5, 40, 40, 3)
        assert np.array_equal(archive["arr_0"], np.stack(list(found.values())))
    assert sorted(path.name for path in places.whole.iterdir()) == [NAME, f"{NAME}.npz"]


def test_images_are_resized_before_they_become_bytes(places: Places) -> None:
    tokenizer = load_tokenizer(places.vq, {"image_size": SIZE})
    for path in sorted((places.whole / NAME).iterdir()):
        found = provenance.read(path)
        codes_T = provenance.unpack_codes(found.fields["codes"], 32)
        decoded = F.interpolate(tokenizer.decode(codes_T.view(1, GRID, GRID)), size=(40, 40), mode="bicubic")
        assert np.abs(found.pixels_HWC.astype(int) - to_bytes(decoded)[0]).max() <= 1  # another number of threads
        assert found.request.params.cfg_scale == 1.5 and found.untouched


def test_classes_are_drawn_from_seed_and_index_alone(places: Places) -> None:
    sampler = EvalSampler.from_pretrained(places.gpt, places.vq, "cpu", tokenizer_config={"image_size": SIZE})
    params = sample_c2i_ddp.check(sample_c2i_ddp.parser().parse_args(places.flags(places.whole)))
    few, many = (sample_c2i_ddp.random_requests(sampler, params, 3, count) for count in (5, 600))
    assert many[:5] == few
    labels = [request.label for request in many]
    assert [request.index for request in many] == list(range(600)) and set(labels) == {0, 1, 2}
    assert max(abs(labels.count(label) - 200) for label in (0, 1, 2)) < 60
    assert labels != [request.label for request in sample_c2i_ddp.random_requests(sampler, params, 4, 600)]
    made = [provenance.read(path).request.label for path in sorted((places.whole / NAME).iterdir())]
    assert made == labels[:5]


def test_two_processes_go_on_with_what_is_there(places: Places, tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    for index in (0, 3):
        (folder / f"{index:06d}.png").write_bytes((places.whole / NAME / f"{index:06d}.png").read_bytes())
    other = (places.whole / NAME / "000001.png").read_bytes()
    (folder / "000004.png").write_bytes(other)  # another image's
    (folder / "000002.png").write_bytes(other[:300])  # cut
    (folder / ".000001.png.1.partial").write_bytes(b"")
    kept = (folder / "000003.png").stat().st_mtime_ns
    flags = places.flags(tmp_path, "--per-proc-batch-size", "1")
    run_processes(2, "retinar.train.upstream.sample_c2i_ddp", *flags)
    assert (folder / "000003.png").stat().st_mtime_ns == kept
    assert files(tmp_path) == files(places.whole)


def test_upstreams_file_is_what_the_flags_say(
    tmp_path: Path, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    """{model} of train_c2i.py, and the bare dict of an FSDP folder: the same images, in folders named as upstream's."""
    model = GPT(gpt_config("GPT-tiny", vocab_size=32, num_classes=2, grid=GRID))
    model.output.weight.data.normal_()
    (tmp_path / "0050000").mkdir()
    torch.save({"model": file_weights(model), "steps": 1}, tmp_path / "0000007.pt")
    torch.save(file_weights(model), tmp_path / "0050000" / "consolidated.pth")
    out = tmp_path / "out"
    named = f"size-{SIZE}-size-{SIZE}-VQ-8-topk-4-topp-0.9-temperature-0.8-cfg-1.0-seed-3"
    more = [
        *("--gpt-model", "GPT-tiny", "--image-size-eval", str(SIZE), "--num-fid-samples", "2", "--cfg-scale", "1.0"),
        *("--top-k", "4", "--top-p", "0.9", "--temperature", "0.8", "--cfg-interval", "2.5"),
    ]
    fsdp = tmp_path / "0050000" / "consolidated.pth"
    for path, extra, name in (
        (tmp_path / "0000007.pt", [], "0000007"),
        (fsdp, ["--from-fsdp"], "0050000"),
        (fsdp.parent, ["--from-fsdp", "--cls-token-num", "1"], "0050000"),
    ):
        assert sample_c2i_ddp.main(places.flags(out, *more, *extra, "--gpt-ckpt", str(path))) == 0
        assert len(pictures(out / f"GPT-tiny-{name}-{named}")) == 2
    one, two = (pictures(out / f"GPT-tiny-{name}-{named}") for name in ("0000007", "0050000"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    for change, words in ((("--gpt-model", "GPT-B"), "--gpt-model GPT-B"), (("--num-classes", "5"), "num_classes")):
        assert sample_c2i_ddp.main(places.flags(out, *more, "--gpt-ckpt", str(fsdp), *change)) == 2
        assert words in (said := capsys.readouterr().err) and said.count("\n") == 1


REFUSED = {
    ("--precision", "fp16"): "--precision bf16 or none",
    ("--gpt-type", "t2i"): "--gpt-type c2i",
    ("--cls-token-num", "120"): "--cls-token-num 1",
    ("--gpt-model", "GPT-Q"): "invalid choice",
    ("--num-classes", "1000"): "leave out --num-classes",
    ("--codebook-size", "16384"): "leave out --codebook-size",
    ("--image-size", "64"): "as it was trained",
    ("--vq-model", "VQ-16"): "add --vq-model VQ-8",
    ("--downsample-size", "16", "--image-size", "64"): "--downsample-size 8",
    ("--cfg-interval", "-0.5"): "-1 guides all",
    ("--cfg-interval", "nan"): "-1 guides all",
    ("--top-p", "1.5"): "top-p",
    ("--num-fid-samples", "0"): "--num-fid-samples of at least 1",
    ("--per-proc-batch-size", "0"): "--per-proc-batch-size of at least 1",
    ("--gpt-ckpt", "nothing"): "nothing",
    ("--seed", "4"): "unknown --seed",
}


@pytest.mark.parametrize("change", REFUSED, ids=" ".join)
def test_what_cannot_be_met_is_one_sentence(
    change: tuple[str, ...], places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample_c2i_ddp.main(places.flags(tmp_path / "out", *change)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and REFUSED[change] in said, said
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample_c2i_ddp.main([]) == 2 and "no --gpt-ckpt" in capsys.readouterr().err
    assert sample_c2i_ddp.main(["--gpt-ckpt", "x"]) == 2 and "no --vq-ckpt" in capsys.readouterr().err
