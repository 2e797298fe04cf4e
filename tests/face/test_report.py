"""The report as a folder and as a page: self-contained, complete, safe, whole or absent."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.report import check_report_folder, plots, write_report
from retinar.report import page as page_module
from retinar.report.page import Drawn, render_page
from retinar.report.text import report_lines
from tests.face.report_world import CLASSES, Pictures, evaluation, picture, write_pictures

WHEN = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
VOID = {"meta", "link", "img", "source", "br", "hr"}


class Blocks:
    """A tokenizer that keeps the mean colour of quarters."""

    class config:
        image_size, codebook_size = 32, 64

    def encode(self, images_BCHW: Tensor) -> Tensor:
        self.kept = torch.nn.functional.adaptive_avg_pool2d(images_BCHW, 4)
        return torch.zeros(len(images_BCHW), 4, 4, dtype=torch.int64)

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(self.kept, scale_factor=8.0)


class Page(HTMLParser):
    """Every element with its attributes, checked for balance; the text; and where identifiers occur."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def coarse_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots at full size cost a tenth of a second each; the report that all tests read has them so."""
    monkeypatch.setattr(plots, "DPI", 40)


def little(pictures: Pictures) -> dict[str, Any]:
    """An evaluation without figures, so without plots."""
    return {"real": str(pictures.real), "fake": str(pictures.fake)}


def write(folder: Path, found: dict[str, Any], pictures: Pictures, **changes: Any) -> Path:
    given: dict[str, Any] = {"real": pictures.real, "fake": pictures.fake, "train": pictures.train, "date": WHEN}
    return write_report(found, folder, **(given | changes))


@pytest.fixture(scope="module")
def report(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every part; read only."""
    folder = tmp_path_factory.mktemp("reports") / "report"
    found = evaluation(pictures)
    path = write(
        folder, found, pictures, tokenizer=Blocks(), runs=[pictures.run], reading=8, command="retinar evaluate a b"
    )
    assert path == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text(encoding="utf-8"))


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_folder_has_what_it_should(report: Path) -> None:
    assert {path.name for path in report.iterdir()} == {
        "report.html",
        "metrics.json",
        "plots",
        "reading",
        "reading-key.csv",
    }
    plots = {path.stem for path in (report / "plots").iterdir()}
    assert plots == {
        *("scores", "nearest-inception", "nearest-lpips", "usefulness", "class-fidelity", "run-1"),
        *("real", "generated", "reconstructed", "closest-pairs"),
    }
    for path in (report / "plots").iterdir():
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 100 and np.asarray(image.convert("RGB")).std() > 1, path.name
    assert (report / "report.html").stat().st_size < 8_000_000


def test_nothing_is_fetched_and_every_picture_decodes(page: Page) -> None:
    addresses = [
        attributes[name]
        for tag, attributes in page.elements
        for name in ("src", "srcset", "data", "poster", "action")
        if name in attributes
    ]
    addresses += [attributes["href"] for attributes in page.of("link")]
    pictures = [address for address in addresses if address and address.startswith("data:image/")]
    assert len(pictures) > 60 and set(addresses) - set(pictures) == {"data:,"}
    for address in pictures:
        head, _, body = address.partition(",")
        with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as image:
            image.load()
            assert f"data:image/{(image.format or '').lower()};base64" == head
            assert not image.getexif() and "exif" not in image.info
    assert not page.of("script") and not page.of("iframe") and not page.of("object")
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all("url(" not in (attributes.get("style") or "") for _, attributes in page.elements)
    policy = next(each["content"] for each in page.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_links_lead_to_parts_of_the_page(page: Page) -> None:
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    links = [attributes["href"] for attributes in page.of("a")]
    assert len(links) == 10 and all(link and link[0] == "#" and link[1:] in names for link in links)
    labelled = [attributes["aria-labelledby"] for attributes in page.of("section")]
    assert set(labelled) <= set(names)


def test_it_can_be_heard(page: Page) -> None:
    """Alternative texts that tell pictures apart, header cells with their direction, headings in order."""
    alts = [attributes.get("alt") for attributes in page.of("img")]
    assert all(alt and len(alt) > 8 for alt in alts) and len(set(alts)) > 0.9 * len(alts)
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table"))
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.of("html")[0]["lang"] == "en"


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def test_every_figure_is_on_the_page_in_full(report: Path, page: Page) -> None:
    """But for the distances of single images, which the histograms show."""
    shown = {float(str(attributes["value"])) for attributes in page.of("data")}
    found = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    asked = 0
    for path, value in leaves(found):
        if path[:2] in (("memorisation", "distances"), ("memorisation", "pairs"), ("memorisation", "counts")):
            continue
        if "n" in path or path[-2:-1] in (("n_train",), ("n_test",)):
            continue  # counts, written as words, as are those of a floor
        if path[-1] in ("draws", "n_sample", "n_reference") or path[-2:] == ("source_alone_auroc", "interval"):
            continue
        if path[-1] == "sd" and not {"floor", "rows"} & set(path[:-2]):
            continue
        if path[-1] == "sd" and {"by_source", "operating_point"} & set(path):
            continue
        assert float(value) in shown, path
        asked += 1
    assert asked > 200


def test_metrics_hold_the_dictionary(report: Path, pictures: Pictures) -> None:
    found = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    made_by = found.pop("made_by")
    assert found == json.loads(json.dumps(evaluation(pictures)))
    assert made_by["command"] == "retinar evaluate a b" and made_by["date"] == "2026-01-02 03:04 UTC"


def test_text_from_files_is_text(report: Path, page: Page) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    assert "<b onclick" not in html and "&lt;b onclick=alert(1)&gt;.png" in html
    assert "/photographs/<b onclick=alert(1)>.png : cannot identify & read" in page.words


def test_what_was_compared_and_its_limits_are_told(page: Page, pictures: Pictures) -> None:
    for words in (
        str(pictures.real),
        str(pictures.fake),
        str(pictures.train),
        "ab" * 32,
        "2026-01-02",
        "retinar evaluate a b",
    ):
        assert words in page.words
    assert "healthy: 7 real, 7 scored; npdr: 7 real, 7 scored; all together: 14 real, 14 scored" in page.words
    for warning in ("fewer than 2,048 images", "label and source are tied", "a warning of memorisation"):
        assert warning in page.words
    assert page.words.count("flagged") >= 1 and "photographs of patients" in page.words


@pytest.mark.parametrize(
    ("absent", "heading"),
    [
        (("scores",), "Distance from the photographs"),
        (("diversity",), "Diversity"),
        (("memorisation",), "Memorisation"),
        (("usefulness",), "Usefulness to a classifier"),
        (("reconstruction", "tokenizer"), "What the tokenizer loses"),
        (("inception", "lpips", "skipped", "warnings"), ""),
    ],
)
def test_a_part_that_was_not_measured_is_left_out(
    absent: tuple[str, ...], heading: str, page: Page, pictures: Pictures
) -> None:
    found = {key: value for key, value in evaluation(pictures).items() if key not in absent}
    html = Page(render_page(found, Drawn(), {"version": "1", "date": "today", "command": "", "seed": 0}))
    links = [attributes["href"] for attributes in html.of("a")]
    assert len(links) == 7 - bool(heading)  # without pictures, runs and a reading
    if heading:
        assert heading in page.words and heading not in html.words
    assert "\n".join(report_lines(found))  # the terminal does without it too


def test_the_least_there_is(pictures: Pictures, tmp_path: Path) -> None:
    """Only photographs through a tokenizer."""
    found = {
        key: value for key, value in evaluation(pictures).items() if key in ("real", "tokenizer", "reconstruction")
    }
    path = write(tmp_path / "report", found, pictures, fake=None, train=None, tokenizer=Blocks(), reading=40)
    html = Page(path.read_text(encoding="utf-8"))
    assert "through a tokenizer" in html.words and "Generated" not in html.words
    assert not (tmp_path / "report" / "reading").exists()


def test_figures_that_are_none_or_not_finite(pictures: Pictures, tmp_path: Path) -> None:
    found = evaluation(pictures)
    found["scores"][0]["metrics"]["fid"] = math.nan
    found["scores"][1]["intervals"], found["scores"][1]["floor"] = (
        {},
        {"fid": {**found["scores"][0]["floor"]["fid"], "sd": None}},
    )
    found["usefulness"]["rows"][1]["auroc"] = {"mean": math.nan, "sd": None, "interval": None}
    found["memorisation"]["measures"][0]["generated"]["interval"] = None
    found["diversity"]["fake"][0]["interval"] = None
    html = write(tmp_path / "report", found, pictures).read_text(encoding="utf-8")
    assert "nan" not in Page(html).words.lower().replace("resnant", "")
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["scores"][0]["metrics"]["fid"] is None
    assert any(line.startswith("healthy") and "–" in line for line in report_lines(found))


def test_the_same_twice(report: Path, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the coarse plots
    again = tmp_path / "again"
    write(
        again,
        evaluation(pictures),
        pictures,
        tokenizer=Blocks(),
        runs=[pictures.run],
        reading=8,
        command="retinar evaluate a b",
    )
    names = sorted(path.relative_to(report) for path in report.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((report / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_many_classes_stay_readable(tmp_path: Path) -> None:
    labels = [f"class-{number:02d}-with-a-rather-long-name" for number in range(20)]
    for side in ("real", "fake"):
        for label in labels:
            picture(tmp_path / side / label / "0.png", 0, 300)
    scores = [
        {"label": label, "mode": "clean", "n_real": 1, "n_fake": 1, "metrics": {"fid": 1.0}, "floor": {}}
        for label in [*labels, "all"]
    ]
    found = {"real": str(tmp_path / "real"), "fake": str(tmp_path / "fake"), "scores": scores}
    path = write_report(found, tmp_path / "report", real=tmp_path / "real", fake=tmp_path / "fake")
    html = Page(path.read_text(encoding="utf-8"))
    assert "Not shown: 12 further classes" in html.words and path.stat().st_size < 2_000_000
    assert all(label in html.words for label in labels)


def test_files_left_out_are_not_shown(pictures: Pictures, tmp_path: Path) -> None:
    found = little(pictures)
    out = pictures.fake / "healthy" / "fake3.png"
    found["skipped"] = [{"file": str(out), "reason": "greyscale"}]
    html = Page(write(tmp_path / "report", found, pictures).read_text(encoding="utf-8"))
    alts = [str(attributes["alt"]) for attributes in html.of("img")]
    assert "Generated image: fake2.png" in alts and alts.count("Generated image: fake3.png") == 1  # of npdr


def test_a_name_that_is_no_utf8(pictures: Pictures, tmp_path: Path) -> None:
    found = little(pictures)
    found["skipped"] = [{"file": "/photographs/\udcff.png", "reason": "unreadable"}]
    path = write(tmp_path / "report", found, pictures)
    assert "\\udcff.png" in path.read_text(encoding="utf-8")
    assert (
        json.loads((tmp_path / "report" / "metrics.json").read_text())["skipped"][0]["file"]
        == "/photographs/\udcff.png"
    )


def test_on_the_terminal(pictures: Pictures) -> None:
    told = list(report_lines(evaluation(pictures)))
    assert sum(line.startswith(CLASSES) and "clean" in line for line in told) == 12
    for words in (
        "LPIPS distance",
        "PSNR dB",
        "held out",
        "generated images",
        "note: label and source are tied",
        "left out: ",
    ):
        assert any(words in line for line in told), words


# ---- whole or absent ------------------------------------------------------------------------------------------------


def test_a_failure_leaves_the_earlier_report(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    write(folder, little(pictures), pictures)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(page_module, "TITLES", {})
    with pytest.raises(KeyError):
        write(folder, little(pictures), pictures)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_an_earlier_report_is_replaced_as_a_whole(pictures: Pictures, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write(folder, evaluation(pictures), pictures, reading=8)
    write(folder, little(pictures), pictures)
    assert not (folder / "reading").exists() and "Memorisation" not in (folder / "report.html").read_text()


def test_what_is_not_ours_is_kept(pictures: Pictures, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.html").write_text("somebody else's")
    with pytest.raises(InputError, match="found other files"):
        write(folder, little(pictures), pictures)
    (folder / "report.html").unlink()
    write(folder, little(pictures), pictures, reading=8)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"found notes\.txt"):
        write(folder, little(pictures), pictures)
    (folder / "notes.txt").unlink()
    form = folder / "reading" / "form.csv"
    form.write_text(form.read_text().replace("001,,", "001,real,"))
    with pytest.raises(InputError, match="filled in"):
        write(folder, little(pictures), pictures)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="found a file"):
        check_report_folder(tmp_path / "file")


@pytest.mark.parametrize("place", ["fake", "fake/report", "fake/healthy/report", "."])
def test_it_does_not_mix_with_the_images(place: str, pictures: Pictures) -> None:
    folder = pictures.real.parent / place
    with pytest.raises(InputError, match=r"beside|other files"):
        write(folder, little(pictures), pictures)
    assert not list(pictures.fake.rglob("*.html"))


def test_beside_the_images_of_generate(tmp_path: Path, pictures: Pictures) -> None:
    """The output folder of generate keeps its images in a folder of their own: a report fits beside it."""
    picture(tmp_path / "out" / "images" / "healthy" / "0.png", 0, 16)
    check_report_folder(tmp_path / "out" / "report", [tmp_path / "out"])
    with pytest.raises(InputError, match="beside"):
        check_report_folder(tmp_path / "out" / "images" / "report", [tmp_path / "out"])
