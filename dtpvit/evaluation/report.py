"""``dtpvit report``: runs beside each other, as one HTML page and as Markdown."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtpvit.datamodules.image_places import Place, read_place
from dtpvit.datamodules.samples import SkippedSample, decode_image
from dtpvit.errors import UserError
from dtpvit.evaluation.picture_sheet import data_address, jpeg
from dtpvit.evaluation.report_page import Picture, Report, Section, Table, as_html, as_markdown
from dtpvit.evaluation.run_differences import differences
from dtpvit.evaluation.run_figures import Panel, inline_svg, panels, sheet_png, swatch
from dtpvit.evaluation.run_record import RunRecord, read_runs
from dtpvit.evaluation.run_table import COLUMNS, ComparedRun, RunGroup, grouped
from dtpvit.output_file import output_file, write_text

__all__ = ["report"]

PICTURE_WIDTH = 900  # pixels of a run's picture of segments, at most
PACKAGES = ("dtpvit", "python", "torch", "lightning", "timm", "open_clip")


def report(runs: list[str], out: str = "report.html") -> None:
    """What training runs reached, what it cost and how it went, in one page that needs nothing but a browser.

    Writes the page, and the same as Markdown beside it with its pictures in a folder: tables of accuracy, GMACs, time,
    memory and tokens; curves; accuracy against GMACs and against the measured time of a step; the last pictures of
    segments; where the configs differ; versions; and the commands that make each run again. Runs of one task that are
    judged on the same data stand in one table. A run that is not finished, or has lost files, has a row that says so.

    Args:
        runs: Folders of `dtpvit fit`, such as runs/*.
        out: The page to write, a name that ends in .html, or a folder for report.html.
    """
    page = _target(out)
    groups = grouped(read_runs(runs))
    pictures = page.with_name(f"{page.stem}_pictures")
    files = dict[str, bytes]()
    made = Report(
        about=shlex.join(["dtpvit", *sys.argv[1:]]),
        notes=COLUMNS,
        sections=[_section(group, number, files) for number, group in enumerate(groups, start=1)],
        versions=_versions(groups),
        commands=[(run.record.name, _commands(run.record)) for run in _in_order(groups)],
    )
    if not any(section.swatches for section in made.sections):
        made.hint = "For curves and plots, pip install 'dtpvit[plot]' and write this report again."
    try:
        if files:
            pictures.mkdir(exist_ok=True)
        for name, content in files.items():
            (pictures / name).write_bytes(content)
        write_text(page.with_suffix(".md"), as_markdown(made, pictures.name))
        write_text(page, as_html(made))
    except OSError as error:
        raise UserError(f"the report cannot be written to {out} ({error.strerror}); give another place") from error
    beside = f"{page.with_suffix('.md').name}{f' and {pictures.name}/' if files else ''}"
    print(f"dtpvit: wrote {page}, and beside it {beside}")


def _target(out: str) -> Path:
    path = Path(out).expanduser()
    if path.suffix.lower() in (".html", ".htm") and not path.is_dir():
        output_file(out)
        return path
    if path.suffix and not path.is_dir():
        raise UserError(f"the report is to be {out!r}; expected a name that ends in .html, or a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out} ({error.strerror}); give another folder") from error
    output_file(str(path / "report.html"))
    return path / "report.html"


def _in_order(groups: Sequence[RunGroup]) -> list[ComparedRun]:
    return sorted((run for group in groups for run in group.runs), key=lambda run: run.number)


def _section(group: RunGroup, number: int, files: dict[str, bytes]) -> Section:
    """What is said of a group; pictures for Markdown are added to ``files``."""
    pictures = [picture for run in group.runs for picture in _picture(run, files)]
    titles, rows = group.table()  # after the pictures: a broken one is a remark in its run's row
    names = {run.number: run.record.name for run in group.runs}
    cells = [[name, *row] for name, row in zip(names.values(), rows, strict=True)]
    section = Section(group.title, (["run", *titles], cells), pictures=pictures)
    drawn = panels(group)
    try:
        section.swatches = [swatch(run, f"run{run}") for run in names]
        drawings = [inline_svg(panel, f"plot{number}-{place}") for place, panel in enumerate(drawn)]
        section.panels = [(drawing, panel.alt) for drawing, panel in zip(drawings, drawn, strict=True)]
        if drawn:
            section.sheet = f"curves{number}.png"
            section.sheet_alt = f"{', '.join(panel.title for panel in drawn)}, of {', '.join(names.values())}"
            files[section.sheet] = sheet_png(drawn, names)
    except ImportError:  # matplotlib is an extra
        section.swatches, section.panels = [], []
    section.remarks = _remarks(group, drawn)
    known = [run.record for run in group.runs if run.record.config]
    if len(known) > 1 and (found := differences([record.config for record in known])):
        section.differences = (["key", *(record.name for record in known)], [[key, *row] for key, row in found])
    return section


def _remarks(group: RunGroup, drawn: Sequence[Panel]) -> list[str]:
    """What the plots of quality against cost do not show by themselves."""
    found = list[str]()
    against = [panel for panel in drawn if panel.dots]
    for panel in against:
        beaten = f"dominated (hollow marks): {', '.join(panel.dominated)}" if panel.dominated else "none is dominated"
        found.append(f"{panel.title}: the dotted line is the Pareto front; {beaten}.")
    records = [run.record for run in group.runs]
    unfinished = [run.record.name for run in group.runs if run.unfinished]
    if against and unfinished:
        found.append(f"Not trained to the end, and shown as far as they are: {', '.join(unfinished)}.")
    devices = {str(start.get("device")) for record in records for start in record.starts}
    if against and len(devices) > 1:
        found.append(f"Times are of different machines: {'; '.join(sorted(devices))}.")
    sizes = {size for record in records if isinstance(size := record.at("data", "init_args", "batch_size"), int)}
    if against and len(sizes) > 1:
        found.append(f"Steps are of different batches: {', '.join(map(str, sorted(sizes)))} samples a process.")
    return found


def _picture(run: ComparedRun, files: dict[str, bytes]) -> list[Picture]:
    """The run's last picture of segments; one that is broken is noted with what else is missing."""
    path = run.record.picture
    if path is None:
        return []
    try:
        image = decode_image(read_place(Place(str(path))))
    except SkippedSample:
        run.record.missing.append(f"pictures/{path.name} cannot be read")
        return []
    image.thumbnail((PICTURE_WIDTH, 100 * PICTURE_WIDTH))
    content = jpeg(np.asarray(image))
    number = path.stem.removeprefix("epoch")  # from 0
    title = f"{run.record.name}, after {f'epoch {int(number) + 1}' if number.isdecimal() else path.stem}"
    file = f"segments{run.number + 1}.jpg"
    files[file] = content
    alt = f"Validation images of {title}, with the segments behind their tokens"
    return [Picture(title, alt, data_address(content), file)]


def _versions(groups: Sequence[RunGroup]) -> Table:
    titles = ["run", "started", *PACKAGES, "device", "processes", "commit"]
    rows = list[list[str]]()
    for record in (run.record for run in _in_order(groups)):
        for start in record.starts:
            known: Any = start.get("versions")
            packages = [str(known.get(name, "")) if isinstance(known, dict) else "" for name in PACKAGES]
            rest = [str(start.get(name) or "") for name in ("device", "processes", "commit")]
            rows.append([record.name, str(start.get("date") or ""), *packages, *rest])
        if not record.starts:
            rows.append([record.name, "not recorded", *[""] * (len(titles) - 2)])
    return titles, rows


def _commands(record: RunRecord) -> list[str]:
    found = [str(start["command"]) for start in record.starts if start.get("command")]
    if (record.folder / "config.yaml").is_file():
        found.append(f"dtpvit fit --config {shlex.quote(str(record.folder / 'config.yaml'))}  # as it was saved")
    return found or ["not recorded"]
