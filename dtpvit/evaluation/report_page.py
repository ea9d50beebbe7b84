"""The report's two forms: one HTML page that loads nothing from anywhere, and Markdown with its pictures beside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from html import escape
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dtpvit.evaluation.trade_off import markdown_table

__all__ = ["Picture", "Report", "Section", "as_html", "as_markdown"]

Table = tuple[list[str], list[list[str]]]
"""Titles, the first of which stands over the names of the rows, and rows."""


@dataclass(frozen=True)
class Picture:
    """A picture of a run's: its title, text for those who do not see it, ``data:`` address, and name of the file."""

    title: str
    alt: str
    address: str
    file: str


@dataclass
class Section:
    """What is said of a group of runs.

    Attributes:
        title: Task and data.
        table: The standard figures.
        swatches: Line and mark of each run, as ``svg`` elements; empty without matplotlib.
        panels: ``svg`` elements, with what they show in words.
        sheet: Name of the file of all of them on one sheet; empty without.
        sheet_alt: What is on it.
        remarks: What must be known to read the plots.
        pictures: Segments of the runs that drew them.
        differences: Keys of the configs; names of the columns are those of the runs.
    """

    title: str
    table: Table
    swatches: list[str] = field(default_factory=list)
    panels: list[tuple[str, str]] = field(default_factory=list)
    sheet: str = ""
    sheet_alt: str = ""
    remarks: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    differences: Table | None = None


@dataclass
class Report:
    """All of it.

    Attributes:
        about: The command that made it.
        notes: Of the columns of the tables, the meaning.
        sections: One a group.
        versions: One row a start of a run.
        commands: Of each run, how it was started and, where it was continued, how.
        hint: What would have made it complete; empty if nothing.
    """

    about: str
    notes: dict[str, str]
    sections: list[Section]
    versions: Table
    commands: list[tuple[str, list[str]]]
    hint: str = ""


def as_html(report: Report) -> str:
    """The page. Every text in it is escaped; only the drawings are taken as they are."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["drawing"] = Markup
    environment.filters["kind"] = _kind
    environment.filters["broken"] = _broken
    return environment.from_string(_PAGE).render(report=report).lstrip()


def as_markdown(report: Report, pictures: str) -> str:
    """The same for wikis and pull requests; ``pictures`` is the folder of the files, as seen from the text."""

    def picture(alt: str, file: str) -> str:
        return f"![{_plain(alt)}]({quote(os.fsencode(f'{pictures}/{file}'))})"

    lines = ["# Training report", *_fenced([report.about])]
    lines += [f"{report.hint}\n"] if report.hint else []
    for section in report.sections:
        lines += [f"## {_plain(section.title)}\n", _table(section.table, figures=True)]
        if section.sheet:
            lines += ["### Curves, and quality against cost\n", picture(section.sheet_alt, section.sheet) + "\n"]
        lines += [f"{_plain(remark)}\n" for remark in section.remarks]
        if section.pictures:
            lines += ["### Segments\n"]
            lines += [f"{_plain(one.title)}\n\n{picture(one.alt, one.file)}\n" for one in section.pictures]
        if section.differences is not None:
            lines += ["### Configs, where they differ\n", _table(section.differences)]
    lines += ["## Versions\n", _table(report.versions), "## Commands\n"]
    for name, commands in report.commands:
        lines += [f"{_plain(name)}:", *_fenced(commands)]
    lines += ["## Columns\n", *(f"- **{name}**: {_plain(text)}" for name, text in report.notes.items())]
    return "\n".join(lines) + "\n"


def _kind(cell: str) -> str:
    """The class of a cell: numbers stand right and unbroken, sentences need some width."""
    if re.fullmatch(r"(≈ )?-?[\d.e+-]+( of \d+)?", cell):
        return "number"
    return "words" if " " in cell else ""


def _broken(text: str) -> Markup:
    """The text, escaped, with places at which a line may be broken within keys and paths."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z_])(?=[./]\w\w)", text))  # escapes what it joins


def _plain(text: str) -> str:
    """Markdown that shows as ``text``, in one line."""
    text = escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+-])", r"\\\1", text)


def _table(table: Table, figures: bool = False) -> str:
    titles, rows = table
    numbers = {place for row in rows for place, cell in enumerate(row) if figures and _kind(cell) == "number"}
    words = set(range(len(titles))) - numbers
    return markdown_table([*map(_plain, titles)], [[*map(_plain, row)] for row in rows], words)


def _fenced(lines: list[str]) -> list[str]:
    longest = max((len(found) for line in lines for found in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["", fence, *lines, fence, ""]


_MACROS = """
{% macro table(content, caption, swatches=[], figures=false) %}
<div class="wide" role="region" tabindex="0" aria-label="{{ caption }}">
<table>
<caption>{{ caption }}</caption>
<thead><tr>
{% for title in content[0] %}
<th scope="col"{% if title | length < 30 %} class="short"{% endif %}>
{%- for part in title.split(", ") %}{{ part | broken }}{% if not loop.last %},<br>{% endif %}{% endfor %}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in content[1] %}
<tr><th scope="row">{% if swatches %}{{ swatches[loop.index0] | drawing }} {% endif %}{{ row[0] | broken }}</th>
{%- for cell in row[1:] %}<td class="{{ cell | kind if figures }}">{{ cell | broken }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
"""

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1f2328; --soft: #57606a; --line: #d0d7de; --band: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --ink: #e6edf3; --soft: #a3adb8; --line: #3a424c; --band: #1c2128 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1500px; padding: 1rem; font: 16px/1.5 system-ui, sans-serif }
body { color: var(--ink); background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem }
a { color: inherit }
code, pre { font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace }
pre { background: var(--band); padding: .6rem .8rem; margin: .3rem 0 1rem; white-space: pre-wrap }
.wide { overflow-x: auto; border: 1px solid var(--line); margin: .5rem 0 }
.wide:focus-visible { outline: 2px solid #0072b2 }
table { border-collapse: collapse; font-size: .85rem; width: 100%; overflow-wrap: normal }
caption { text-align: left; padding: .4rem .6rem; color: var(--soft); font-size: .8rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .45rem; border-top: 1px solid var(--line) }
th, td { overflow-wrap: break-word; max-width: 18rem }
tbody th { font-weight: 600; min-width: 6.5rem }
th svg { display: block }
thead th { background: var(--band); vertical-align: bottom }
th.short { white-space: nowrap }
td.words { min-width: 10rem }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: .8rem 1.2rem }
figure { margin: 0; break-inside: avoid; max-width: 540px }
figure svg { display: block; width: 100%; height: auto }
figcaption, .soft { color: var(--soft); font-size: .875rem }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .5rem 0; list-style: none }
.swatch svg, th svg { width: 2.6em; height: 1em; vertical-align: -.1em }
img { display: block; width: 100%; height: auto; background: #fff }
dt { font-weight: 600; margin-top: .4rem } dd { margin: 0 0 0 1rem }
@page { size: A4 landscape; margin: 12mm }
@media print {
  :root { color-scheme: light; --back: #fff; --ink: #000; --soft: #333; --line: #999; --band: #fff }
  body { padding: 0; max-width: none; font-size: 10pt } nav { display: none }
  .wide { overflow: visible; border: 0 } table { font-size: 7pt }
  th, td { padding: 2pt 3pt } td { overflow-wrap: anywhere }
  td.words, tbody th { min-width: 0 } tr, pre { break-inside: avoid }
  h2, h3 { break-after: avoid } .figures { grid-template-columns: repeat(3, 1fr) }
}
"""

_PAGE = (
    _MACROS
    + """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report</title>
<link rel="icon" href="data:,">
<style>"""
    + _STYLE
    + """</style>
</head>
<body>
<header>
<h1>Training report</h1>
<code>{{ report.about }}</code>
{% if report.hint %}<p>{{ report.hint }}</p>{% endif %}
<nav aria-label="Contents"><ul>
{% for section in report.sections %}<li><a href="#group{{ loop.index }}">{{ section.title }}</a></li>{% endfor %}
<li><a href="#versions">Versions</a></li>
<li><a href="#commands">Commands</a></li>
<li><a href="#columns">Columns</a></li>
</ul></nav>
</header>
<main>
{% for section in report.sections %}
<section>
<h2 id="group{{ loop.index }}">{{ section.title }}</h2>
{{ table(section.table, "What the runs reached and what it cost", section.swatches, figures=true) }}
{% if section.panels %}
<h3>Curves, and quality against cost</h3>
<ul class="key">
{% for row in section.table[1] %}
<li><span class="swatch">{{ section.swatches[loop.index0] | drawing }}</span> {{ row[0] }}</li>
{% endfor %}
</ul>
<div class="figures">
{% for drawing, alt in section.panels %}
<figure role="img" aria-label="{{ alt }}">{{ drawing | drawing }}</figure>
{% endfor %}
</div>
{% endif %}
{% for remark in section.remarks %}<p class="soft">{{ remark }}</p>{% endfor %}
{% if section.pictures %}
<h3>Segments</h3>
<div class="figures">
{% for picture in section.pictures %}
<figure><figcaption>{{ picture.title }}</figcaption>
<img src="{{ picture.address }}" alt="{{ picture.alt }}"></figure>
{% endfor %}
</div>
{% endif %}
{% if section.differences %}
<h3>Configs, where they differ</h3>
{{ table(section.differences, "Values of the keys that differ; empty: the config lacks the key") }}
{% endif %}
</section>
{% endfor %}
<section>
<h2 id="versions">Versions</h2>
{{ table(report.versions, "What each start of a run recorded") }}
</section>
<section>
<h2 id="commands">Commands</h2>
{% for name, commands in report.commands %}
<h3>{{ name }}</h3>
{% for command in commands %}<pre><code>{{ command }}</code></pre>{% endfor %}
{% endfor %}
</section>
<section>
<h2 id="columns">Columns</h2>
<dl>
{% for name, text in report.notes.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}
</dl>
</section>
</main>
</body>
</html>
"""
)
