"""Held-out questions in files: conversations to validate on, and what ``dtpvit vqa`` asks and is scored by."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["AskedImage", "conversation", "write_json", "write_questions"]


class AskedImage(NamedTuple):
    """One question about one image; ``image`` is a path below the folder of the images."""

    id: str
    image: str
    text: str
    answer: str


def conversation(name: str, image: str, pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A record in LLaVA's form: the image, then questions and answers in turn."""
    turns: list[dict[str, str]] = []
    for question, answer in pairs:
        place = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": f"{place}{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    """A list of records, one a line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_questions(folder: Path, asked: Iterable[AskedImage]) -> None:
    """``questions.jsonl`` of {"question_id", "image", "text"}, and ``answers.jsonl`` of {"question_id", "answer"}."""
    with (
        (folder / "questions.jsonl").open("w", encoding="utf-8") as questions,
        (folder / "answers.jsonl").open("w", encoding="utf-8") as answers,
    ):
        for one in asked:
            row = {"question_id": one.id, "image": one.image, "text": one.text}
            questions.write(json.dumps(row, ensure_ascii=False) + "\n")
            answers.write(json.dumps({"question_id": one.id, "answer": one.answer}, ensure_ascii=False) + "\n")
