"""Small instruction data sets for the tests of this folder, and a chat that reads them."""

import json
from pathlib import Path

import torch
from labelled_files import plain_png

from dtpvit.interop.chat import IMAGE_ID


def llava(number: int, questions: int = 1, *, image: bool = True) -> dict:
    """A record of which every question and answer says whose it is."""
    turns = []
    for q in range(questions):
        place = "<image>\n" if image and q == 0 else ""
        turns += [
            {"from": "human", "value": f"{place}what is {number}.{q}?"},
            {"from": "gpt", "value": f"{number} {q}"},
        ]
    return {"id": f"r{number}"} | ({"image": f"pictures/{number}.png"} if image else {}) | {"conversations": turns}


def write_json(folder: Path, records: list, *, broken: tuple[int, ...] = (), name: str = "train.json") -> str:
    """A file of records, with an image for each number that is named in it; ``who`` reads the number back."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for record in records:
        found = record.get("image", []) if isinstance(record, dict) else []
        for image in [found] if isinstance(found, str) else found:
            number = int(Path(image).stem)
            (folder / image).write_bytes(b"<html>404</html>" if number in broken else plain_png(number))
    path = folder / name
    lines = "\n".join(map(json.dumps, records))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(records))
    return str(path)


def said(chat, batch) -> list[list[str]]:
    """What is supervised in each row of a batch: the answers."""
    rows = []
    for ids, supervised, length in zip(batch["ids"], batch["supervised"], batch["length"], strict=True):
        assert not supervised[length:].any() and (ids[length:] == chat.pad_id).all()
        edges = torch.nn.functional.pad(supervised[:length].int(), (1, 1)).diff()
        spans = zip((edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0], strict=True)
        rows.append([chat.text(ids[start:end].tolist()) for start, end in spans])
    return rows


def images_of(batch) -> list[list[int]]:
    """Numbers of the plain images of each row."""
    corners = batch["image"][:, :, 0, 0].long()
    numbers = iter((corners[:, 0] // 16 + corners[:, 1] // 16 * 16).tolist())
    counts = [int((ids[:length] == IMAGE_ID).sum()) for ids, length in zip(batch["ids"], batch["length"], strict=True)]
    rows = [[next(numbers) for _ in range(count)] for count in counts]
    assert next(numbers, None) is None
    return rows
