"""The browser that pages are tested in tells a good page from a bad one."""

from pathlib import Path

import pytest
from browser import page_width, visit
from PIL import Image

GOOD = '<!DOCTYPE html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><p>a page</p>'


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "a page.html"


def test_a_page_that_fits_is_seen_as_one(page: Path) -> None:
    page.write_text(GOOD)
    seen = visit(page, 390, 600, script="[innerWidth, document.body.innerText]")
    assert seen.value == [390, "a page"]
    assert (seen.page_width, seen.errors, seen.requests) == (390, [], [])
    assert len(Image.open(seen.picture).convert("L").getcolors()) > 1


def test_a_page_that_scrolls_sideways_asks_elsewhere_and_fails_is_seen_as_one(page: Path) -> None:
    page.write_text(
        GOOD + '<div style="width: 500px">wide</div><img src="http://example.org/a.png">'
        '<script>throw new Error("broken")</script>'
    )
    seen = visit(page, 390)
    assert seen.page_width >= 500
    assert seen.requests == ["http://example.org/a.png"]
    assert any("broken" in error for error in seen.errors)
    assert page_width(page, 1280) == 1280
