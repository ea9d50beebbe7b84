"""Pages of the site whose text stands elsewhere in the repository, and links between the two.

- ``PAGES`` are files outside ``docs/`` that are pages as they are.
- ``<!-- from README.md: Methods -->`` in a page stands for that section of that file, without its heading; with nothing
  behind the colon, for what comes before the first heading of the second level.
- A link to a file of the repository leads to its page; where it has none, its text stands alone. A link to a page of
  ``docs/`` that is absent is left as it is, for MkDocs to reject.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {
    f"data/{path.parent.name}/README.md": f"data_sets/{path.parent.name}.md"
    for path in REPOSITORY.glob("data/*/README.md")
}
_INCLUDED = re.compile(r"^<!-- from ([\w/]+\.md):(.*)-->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]\n]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`(?!\])", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand outside ``docs/``."""
    for source, page in PAGES.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=linked(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in sections of other files, and lead links to pages."""
    own = page.file.src_uri
    if own.startswith("results/"):
        page.meta.setdefault("hide", ["toc"])  # tables need the width
    markdown = linked(markdown, f"docs/{own}", own) if page.file.generated_by is None else markdown
    markdown = _INCLUDED.sub(lambda found: linked(section(found[1], found[2].strip()), found[1], own), markdown)
    # GitHub needs a | in a table's code escaped; Python-Markdown would show the backslash.
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), markdown)


def section(source: str, heading: str) -> str:
    """What stands under ``## heading`` in a file of the repository, or before all of these.

    Raises:
        PluginError: If there is none.
    """
    text = (REPOSITORY / source).read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    found = dict(zip(["", *parts[1::2]], parts[::2], strict=True))
    if heading not in found:
        raise PluginError(f"{source} has no section {heading!r}; it has {', '.join(list(found)[1:])}")
    return re.sub(r"\A\s*# .*\n", "", found[heading]).strip()


def linked(text: str, source: str, page: str) -> str:
    """``text`` of the file ``source`` with its links as the page ``page`` of the site needs them."""
    kept = [found.span() for found in _CODE.finditer(text)]

    def lead(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if any(start <= found.start() < stop for start, stop in kept):
            return found[0]
        goal = _page_of(path)
        if goal is None:
            return label if (REPOSITORY / path).exists() else found[0]
        return f"[{label}]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor})"

    return _LINK.sub(lead, text)


def _page_of(path: str) -> str | None:
    """The page that shows a file of the repository."""
    inside = path.removeprefix("docs/") if path.startswith("docs/") else None
    return {**PAGES, "README.md": "index.md"}.get(path, inside)
