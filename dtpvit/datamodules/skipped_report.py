"""The file that lists the records a run could not use."""

import json
from collections.abc import Iterable
from pathlib import Path

from dtpvit.datamodules.conversations import Skipped

__all__ = ["SkippedReport"]


class SkippedReport:
    """Appends ``{"data", "record", "cause", "detail"}``, one line each; what the file says already is not repeated.

    Several ranks may append to one file: a line is written at once.

    Args:
        path: Made, with its folder, when there is something to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set[str]()

    def add(self, data: str, skipped: Iterable[Skipped]) -> None:
        """List records of ``data``."""
        lines = [json.dumps({"data": data, **one._asdict()}) for one in skipped]
        new = [line for line in dict.fromkeys(lines) if line not in self._known]
        if not new:
            return
        self._known.update(new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in new))
