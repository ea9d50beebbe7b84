"""Pages in a real browser: Debian's Chromium without a window, driven by playwright, nothing downloaded.

``visit`` is one page at one window size and all that can be asked of it; ``screenshot`` and ``page_width`` are short
for the two questions that are asked most. Each starts a browser of its own (about a second), and skips the test, with
the reason, where there is none.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

__all__ = ["Visit", "page_width", "screenshot", "visit"]

FLAGS = ["--disable-gpu", "--disable-quic", "--disable-sync", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update"]


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page.

    Attributes:
        picture: PNG of the whole page, or of the window alone.
        page_width: ``document.documentElement.scrollWidth`` in pixels; more than the window's: it scrolls sideways.
        errors: What the console said in error, exceptions and failed requests included.
        requests: Addresses that the page asked for beside itself and ``data:``; none of these is let out.
        value: What ``script`` came to.
    """

    picture: Path
    page_width: int
    errors: list[str]
    requests: list[str]
    value: object


def visit(
    page: str | Path,
    width: int = 1280,
    height: int = 800,
    *,
    script: str | None = None,
    dark: bool = False,
    whole: bool = True,
    picture: str | Path | None = None,
) -> Visit:
    """Open a page and look at it.

    Args:
        page: A file, or an address on this machine; no other machine is reached.
        width: Of the window, in pixels; what the page's own media queries see.
        height: Likewise.
        script: JavaScript, an expression or a function, run when the page is there.
        dark: Whether the reader prefers dark pages.
        whole: Whether the picture is of the whole page or of the window.
        picture: Where to write it; a new temporary file if left out.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs a browser: apt-get install --no-install-recommends chromium fonts-dejavu-core")
    address = str(page) if "://" in str(page) else Path(page).resolve().as_uri()
    home = urlsplit(address).netloc
    errors, requests = list[str](), list[str]()
    if picture is None:
        handle, picture = tempfile.mkstemp(suffix=".png", prefix=f"page{width}-")
        os.close(handle)

    def decide(route) -> None:
        parts = urlsplit(route.request.url)
        own = parts.scheme in ("data", "blob") or (parts.netloc == home and route.request.url == address)
        if not own:
            requests.append(unquote(route.request.url))
        if own or (parts.scheme in ("http", "https", "ws") and parts.netloc == home) or parts.scheme == "file":
            route.continue_()
        else:
            route.abort()

    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS, chromium_sandbox=False)
        try:
            tab = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.route("**/*", decide)
            tab.goto(address, wait_until="load")
            value = tab.evaluate(script) if script is not None else None
            wide = tab.evaluate("document.documentElement.scrollWidth")
            tab.screenshot(path=str(picture), full_page=whole)
        finally:
            browser.close()
    return Visit(Path(picture), int(wide), errors, requests, value)


def screenshot(page: str | Path, width: int = 1280, height: int = 800) -> Path:
    """PNG of the whole page as a window of that size shows it."""
    return visit(page, width, height).picture


def page_width(page: str | Path, width: int) -> int:
    """How wide the page is in a window of that width, in pixels."""
    return visit(page, width).page_width
