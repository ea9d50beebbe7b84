"""Photographs with conversations, split by image, and a tiny language model of the training text: prepare.py TAR."""

import argparse
import json
import tarfile
from pathlib import Path, PurePosixPath

from dtpvit.datamodules.question_files import AskedImage, conversation, write_json, write_questions
from dtpvit.interop.tiny_language_model import make_tiny_language_model

HELD_OUT = 5  # every fifth record is for testing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a tar of one .json of conversations in LLaVA's form and their images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    options = parser.parse_args()
    if not options.path.is_file():
        parser.error(f"{options.path} is no file; give a tar of conversations and their images")
    with tarfile.open(options.path) as tar:
        files = {member.name: member for member in tar.getmembers() if member.isfile()}
        found = [name for name in files if name.endswith(".json")]
        if len(found) != 1:
            parser.error(f"{options.path} holds {len(found)} .json files; give a tar of one, beside its images")
        content = tar.extractfile(files[found[0]])
        assert content is not None
        records = json.load(content)
        (options.out / "images").mkdir(parents=True, exist_ok=True)
        for record in records:
            image = tar.extractfile(files[str(PurePosixPath(found[0]).parent / record["image"])])
            assert image is not None
            record["image"] = PurePosixPath(record["image"]).name
            (options.out / "images" / record["image"]).write_bytes(image.read())
    prepare(records, options.out)


def prepare(records: list[dict], out: Path) -> None:
    """Write everything that the config asks for; the images are there."""
    train = [record for number, record in enumerate(records) if number % HELD_OUT]
    test = records[::HELD_OUT]
    asked = [
        AskedImage(f"{record['id']}-{number}", record["image"], *pair)
        for record in test
        for number, pair in enumerate(pairs(record))
    ]
    write_json(
        out / "train.json",
        [conversation(record["id"], f"images/{record['image']}", pairs(record)) for record in train],
    )
    write_json(
        out / "test.json",
        [conversation(one.id, f"images/{one.image}", [(one.text, one.answer)]) for one in asked],
    )
    yes_or_no = [one for one in asked if one.answer in ("yes", "no")]
    write_questions(out, yes_or_no)
    texts = [text for record in train for pair in pairs(record) for text in pair]
    make_tiny_language_model(texts, out / "language_model", vocab_size=1024, dim=128, depth=4, num_heads=4)
    print(f"{len(train)} images to train on, {len(test)} to test, with {len(yes_or_no)} yes-or-no questions: {out}")


def pairs(record: dict) -> list[tuple[str, str]]:
    """The record's questions without the image's place, and its answers."""
    said = [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


if __name__ == "__main__":
    main()
