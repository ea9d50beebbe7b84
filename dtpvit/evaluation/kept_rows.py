"""Rows of a comparison that are kept from run to run, each beside all that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dtpvit.evaluation.compared_rows import ComparedRow
from dtpvit.evaluation.trade_off import ComparedResult

__all__ = ["KeptRows", "content_digest"]


class KeptRows:
    """A folder of rows; one that was asked under other circumstances is another row.

    Args:
        folder: Where they lie.
        about: What all rows of this run have in common, as JSON has it; a name in it is shown where it made a
            difference.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, dict(about)

    def result(self, row: ComparedRow, compute: Callable[[], ComparedResult]) -> ComparedResult:
        """The row of an earlier run that asked for the same, or a new one, which is kept."""
        path = self._path(row)
        if path.is_file():
            return ComparedResult(**json.loads(path.read_text(encoding="utf-8"))["result"])
        found = compute()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"result": asdict(found), "question": self._question(row)}), encoding="utf-8")
        partial.replace(path)
        return found

    def changes(self, rows: Iterable[ComparedRow]) -> tuple[int, list[str]]:
        """How many of the rows were kept under other circumstances alone, and which of these differ."""
        count, names = 0, set[str]()
        for row in rows:
            path = self._path(row)
            alike = re.compile(re.escape(_stem(row)) + r"-[0-9a-f]{8}\.json")
            others = [other for other in self.folder.glob("*.json") if alike.fullmatch(other.name)]
            if path in others or not others:
                continue
            count += 1
            latest = max(others, key=lambda other: other.stat().st_mtime)
            before = json.loads(latest.read_text(encoding="utf-8")).get("question", {})
            now = self._question(row)
            names |= {name for name in now if name not in before or before[name] != now[name]}
        return count, sorted(names)

    def _question(self, row: ComparedRow) -> dict[str, Any]:
        return json.loads(json.dumps({**self.about, "reducers": row.reducers}, sort_keys=True, default=str))

    def _path(self, row: ComparedRow) -> Path:
        key = hashlib.sha256(json.dumps(self._question(row), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{_stem(row)}-{key[:8]}.json"


def _stem(row: ComparedRow) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", row.name).strip("-")


def content_digest(*tensors: Tensor | None) -> str:
    """What tells images and labels from others, whatever their files are called and however old they are."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]
