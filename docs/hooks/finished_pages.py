"""A page that would load anything over the network is an error: the site is read from a disk, and tells nobody.

So is a table that Markdown took for text, as it does where no empty line stands before it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.finished_pages")
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*rel=["']?(?:stylesheet|preload|preconnect|icon|prefetch|modulepreload))[^>]*href=["']?((?:https?:)?//[^"'\s>]+)"""
)
_PICTURE = re.compile(r'<img [^>]*src="([^":]+)"[^>]*>')
_INLINE = re.compile(r"(?<!<pre>)<code>[^<]*</code>")
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z]\w*")
_CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A picture leads to itself at its full size; an option is not broken between its hyphens and its name."""
    html = _PICTURE.sub(r'<a href="\1">\g<0></a>', html)
    return _INLINE.sub(lambda code: _OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, an error under ``strict``, of such tables and of addresses that a browser would fetch by itself."""
    if "|---" in _CODE.sub("", output):
        logger.warning("%s has a table without an empty line before it", page.file.src_uri)
    for found in loaded(output):
        logger.warning("%s would load %s over the network; keep a copy in docs/", page.file.src_uri, found)
    return output


def on_post_build(config: MkDocsConfig) -> None:
    """Without the theme's page for what is not found: its addresses hold at the root of a server alone."""
    Path(config.site_dir, "404.html").unlink(missing_ok=True)


def loaded(html: str) -> list[str]:
    """Addresses of scripts, styles, pictures and frames that a page takes from elsewhere."""
    return [found[1] or found[2] for found in _LOADED.finditer(html)]
