"""easy-VQA as conversations, and a tiny language model made from its training text: python prepare.py PATH."""

import argparse
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

from dtpvit.datamodules.question_files import AskedImage, conversation, write_json, write_questions
from dtpvit.interop.tiny_language_model import make_tiny_language_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the official repository, its data folder, or a tar of either")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    options = parser.parse_args()
    if not options.path.exists():
        parser.error(f"{options.path} does not exist; clone https://github.com/vzhou842/easy-VQA and name that folder")
    with tempfile.TemporaryDirectory() as unpacked:
        if options.path.is_file():
            with tarfile.open(options.path) as tar:
                tar.extractall(unpacked, filter="data")
            options.path = Path(unpacked)
        roots = sorted(path.parents[1] for path in options.path.rglob("train/questions.json"))
        if not roots or not (roots[0] / "test" / "questions.json").is_file():
            parser.error(
                "no train/questions.json and test/questions.json below that path; give the official repository"
            )
        prepare(roots[0], options.out)


def prepare(root: Path, out: Path) -> None:
    """Write everything that the config asks for."""
    for split in ("train", "test"):
        if (root / split).resolve() != (out / split).resolve():
            shutil.copytree(root / split / "images", out / split / "images", dirs_exist_ok=True)
    train, test = (json.loads((root / split / "questions.json").read_text()) for split in ("train", "test"))
    of_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in train:
        of_image.setdefault(image, []).append((question, answer))
    conversations = [
        conversation(f"train-{image}", f"train/images/{image}.png", pairs) for image, pairs in of_image.items()
    ]
    asked = [
        AskedImage(f"test-{number}", f"{image}.png", question, answer)
        for number, (question, answer, image) in enumerate(test)
    ]
    write_json(out / "train.json", conversations)
    write_json(
        out / "test.json",
        [conversation(one.id, f"test/images/{one.image}", [(one.text, one.answer)]) for one in asked],
    )
    write_questions(out, asked)
    texts = [text for question, answer, _ in train for text in (question, answer)]
    make_tiny_language_model(texts, out / "language_model", vocab_size=512, dim=128, depth=2, num_heads=4)
    print(f"{len(conversations)} images with {len(train)} questions to train on, {len(asked)} questions to test: {out}")


if __name__ == "__main__":
    main()
