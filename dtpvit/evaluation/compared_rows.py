"""What ``dtpvit compare`` puts beside each other: ways of reducing tokens, in series of rising strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dtpvit.errors import UserError
from dtpvit.yaml_input import parse_yaml

__all__ = ["ComparedRow", "read_rows"]


@dataclass(frozen=True)
class ComparedRow:
    """One way of reducing tokens.

    Attributes:
        series: What it belongs to; the rows of a series are one curve of the picture.
        setting: Which of the series.
        reducers: By block, as in a vision config; empty is the dense model.
    """

    series: str
    setting: str
    reducers: dict[Any, Any]

    @property
    def name(self) -> str:
        return f"{self.series}, {self.setting}" if self.setting else self.series


def read_rows(files: Sequence[str]) -> list[ComparedRow]:
    """The dense model and the rows of files.

    Args:
        files: YAML files, each a mapping from blocks to reducers, which is a series of one row, or a mapping ``{series:
            {setting: {blocks: reducer}}}``.

    Raises:
        UserError: If a file cannot be read or holds something else, or two rows have one name.
    """
    rows = [ComparedRow("dense", "", {})]
    for path in files:
        found = _mapping(path)
        if all("class_path" in value for value in found.values()):
            rows.append(ComparedRow(Path(path).stem, "", found))
            continue
        for series, settings in found.items():
            if "class_path" in settings or not all(isinstance(spec, Mapping) for spec in settings.values()):
                raise UserError(f"{path}: the series {series!r} is no mapping from settings to reducers by block")
            rows += [ComparedRow(str(series), str(setting), dict(spec)) for setting, spec in settings.items()]
    names = [row.name for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two rows are called {min(twice)!r}; rename one")
    return rows


def _mapping(path: str) -> dict[Any, Any]:
    expected = "a YAML file that maps blocks to reducers, or series to settings to those"
    try:
        found = parse_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give {expected}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Mapping) for value in found.values()):
        raise UserError(f"{path} holds something else; expected {expected}")
    return found
