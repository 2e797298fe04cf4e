"""The report in a browser: nothing fails, nothing is fetched, every picture shows, and nothing runs off a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from retinar.report import write_report
from tests.face.browser import Browser, find_programs
from tests.face.report_world import evaluation, write_pictures

PICTURES = "return [...document.images].map(image => [image.alt, image.complete, image.naturalWidth, image.width])"
WIDTHS = "return [document.scrollingElement.scrollWidth, document.documentElement.clientWidth]"
CUT = """
const free = [...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll'));
const beyond = each => each.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
return free.filter(beyond).map(each => each.outerHTML.slice(0, 80));
"""
COLOURS = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with every part."""
    find_programs()
    root = tmp_path_factory.mktemp("report")
    pictures = write_pictures(root)
    found = evaluation(pictures)
    found["skipped"] = [{"file": f"/a/{'very-long-name' * 20}.png", "reason": "unreadable"}]
    path = write_report(
        found,
        root / "report",
        real=pictures.real,
        fake=pictures.fake,
        runs=[pictures.run],
        reading=8,
        command="x" * 300,
    )
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(report: str) -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844), (320, 640)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_shows_whole(width: int, height: int, dark: bool, browser: Browser, report: str) -> None:
    browser.show(width, height, dark=dark)
    browser.open(report)
    assert browser.console() == []
    asked = browser.requests()
    assert report in asked and all(address == report or address.startswith("data:") for address in asked)
    pictures = browser.run(PICTURES)
    assert len(pictures) > 50
    assert all(complete and natural > 0 and shown > 0 for _, complete, natural, shown in pictures)
    page, window = browser.run(WIDTHS)
    assert page <= window <= width
    assert browser.run(CUT) == []


def test_dark_is_dark(browser: Browser, report: str) -> None:
    """The page and its plots follow the reader's choice."""
    seen = []
    for dark in (False, True):
        browser.show(1280, 900, dark=dark)
        browser.open(report)
        plots = browser.run(
            "return [...document.querySelectorAll('picture img')].map(image => image.currentSrc.slice(-90))"
        )
        seen.append((browser.run(COLOURS), plots))
    assert seen[0][0] != seen[1][0] and seen[0][0][0] != seen[0][0][1]
    assert len(seen[0][1]) == 6 and not set(seen[0][1]) & set(seen[1][1])


def test_the_records_see_what_fails(browser: Browser, tmp_path: Path) -> None:
    """A page with an outside picture and an error: both are on record, so that silence above means something."""
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><img src='http://outside.example/a.png' alt='outside'><script>nothing.at.all</script>"
    )
    browser.open(page.as_uri())
    assert "http://outside.example/a.png" in browser.requests()
    told = " ".join(browser.console())
    assert "nothing is not defined" in told and "ERR_" in told
    assert browser.run(PICTURES)[0][2] == 0
