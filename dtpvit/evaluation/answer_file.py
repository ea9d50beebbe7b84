"""The file of answers, which an interrupted run leaves half written and goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtpvit.errors import UserError
from dtpvit.evaluation.json_rows import rows_of
from dtpvit.evaluation.vqa_questions import ImageQuestion

__all__ = ["AnswerFile", "fingerprint"]


class AnswerFile:
    """Answers in the order of their questions, one JSON object a line, complete up to where the file ends.

    Args:
        path: The file; made where it does not exist.
        questions: All that are to be answered.
        metadata: What the answers depend on besides; each line has it.

    Attributes:
        rows: The lines so far.

    Raises:
        UserError: If the file holds answers to other questions, or under other metadata.
    """

    def __init__(self, path: Path, questions: Sequence[ImageQuestion], metadata: Mapping[str, Any]) -> None:
        self._path, self._metadata = path, dict(metadata)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        self.rows = list[dict[str, Any]]()
        if content:
            # Without a whole line there is nothing to tell that the file is ours.
            text = content[: whole or None].decode("utf-8", "replace")
            self.rows = [row.fields for row in rows_of(str(path), text)]
            self._check(questions)
            os.truncate(path, whole)  # what a killed run left of a line

    def _check(self, questions: Sequence[ImageQuestion]) -> None:
        advice = "give another --out, or remove the file"
        if len(self.rows) > len(questions):
            raise UserError(f"{self._path} has {len(self.rows)} answers to {len(questions)} questions; {advice}")
        for row, question in zip(self.rows, questions, strict=False):
            if (row.get("question_id"), row.get("prompt")) != (question.id, question.text):
                found = row.get("question_id")
                raise UserError(f"{self._path} answers question {found!r} where {question.id!r} is asked now; {advice}")
            before = row.get("metadata") or {}
            for name, value in self._metadata.items():
                if before.get(name) != value:
                    raise UserError(
                        f"{self._path} has answers with {name} {before.get(name)}, now it is {value}; {advice}"
                    )

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write answers to the next questions."""
        self.rows += (full := [{**row, "metadata": self._metadata} for row in rows])
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in full)


def fingerprint(checkpoint: str) -> str:
    """What tells the content of a checkpoint, or of all files of an exported folder, from any other's.

    Raises:
        UserError: If it does not exist.
    """
    path = Path(checkpoint).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise UserError(f"checkpoint {checkpoint} does not exist; give a .ckpt file, or a folder that was exported")
    whole = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{each.relative_to(path) if each != path else ''} {digest}\n".encode())
    return whole.hexdigest()[:16]
