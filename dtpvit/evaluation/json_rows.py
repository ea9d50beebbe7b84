"""Rows of the JSON files that questions, answers and predictions come in."""

import json
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from dtpvit.errors import UserError
from dtpvit.json_input import parse_json

__all__ = ["Row", "read_rows", "rows_of"]

_LISTS = ("data", "annotations", "questions")  # TextVQA's, and VQAv2's two


class Row(NamedTuple):
    """One row: where it stands, for messages, and what it says."""

    place: str
    fields: dict[str, Any]


def read_rows(path: str) -> list[Row]:
    """The rows of a file of one JSON object a line, of a JSON list, or of a JSON object that holds them.

    An object may hold a list of rows (``data``, ``annotations`` or ``questions``), or rows by the id of their question,
    which becomes their ``question_id`` (ScienceQA's problems.json).

    Raises:
        UserError: If it cannot be read, or a row is no JSON object; says in which line.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"{path} cannot be read ({cause}); give a file of one JSON object a line") from error
    return rows_of(path, text)


def rows_of(path: str, text: str) -> list[Row]:
    """The rows of a file's text, see :func:`read_rows`.

    Raises:
        UserError: If a row is no JSON object, or there is none.
    """
    rows = [Row(f"{path}, {place}", fields) for place, fields in _rows(path, text)]
    for row in rows:
        if not isinstance(row.fields, dict):
            raise UserError(f"{row.place}: found {_brief(row.fields)}; expected a JSON object")
    if not rows:
        raise UserError(f"{path} has no rows; expected one JSON object a line")
    return rows


def _rows(path: str, text: str) -> list[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        return _numbered(_parsed(path, text))
    try:
        whole = parse_json(text)
    except json.JSONDecodeError:
        # Not splitlines: it breaks at characters that a JSON string may hold.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(f"line {number}", _parsed(path, line, number)) for number, line in lines]
    if not isinstance(whole, dict):
        return [("line 1", whole)]
    for name in _LISTS:
        if isinstance(whole.get(name), list):
            return _numbered(whole[name])
    if whole and all(isinstance(value, dict) for value in whole.values()):
        return [(f"entry {key!r}", {"question_id": key, **value}) for key, value in whole.items()]
    return [("line 1", whole)]


def _numbered(rows: list[Any]) -> list[tuple[str, Any]]:
    return [(f"entry {number}", row) for number, row in enumerate(rows, start=1)]


def _brief(value: Any) -> str:
    """The JSON of a value; of a list, which may be deeper than can be written, its beginning."""
    return reprlib.repr(value) if isinstance(value, list) else json.dumps(value)[:40]


def _parsed(path: str, text: str, line: int | None = None) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {line or error.lineno}: this is no JSON ({error.msg}); expected one JSON object a line, or "
            "one list of them"
        ) from error
