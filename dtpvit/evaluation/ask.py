"""``dtpvit ask``: one image, one question, one answer."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from dtpvit.datamodules.samples import SkippedSample, decode_image
from dtpvit.errors import UserError
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.interop.assistant import Question, load_assistant

__all__ = ["ask"]


def ask(
    questions: list[str],
    checkpoint: str,
    image: list[str] | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    device: str = "auto",
) -> None:
    """Answer questions about images: each answer on standard output, what it took on standard error.

    Several questions are asked apart from each other, each about all images.

    Args:
        questions: In quotes.
        checkpoint: Checkpoint of the instruction task, or an exported folder.
        image: A file; more than once for several images in their order, not at all for a question without.
        system: What stands before the conversation, instead of the chat template's own.
        max_new_tokens: Most tokens of an answer.
        device: auto, cpu, cuda, cuda:1, ...
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    place, images = chosen_device(device), [_image(name) for name in image or ()]
    asked = [Question.of(text, *images, system=system) for text in questions]
    answers = load_assistant(checkpoint, place).answer(asked, max_new_tokens=max_new_tokens)
    for answer in answers:
        print(answer.text, flush=True)
    tokens, seconds = answers[0].visual_tokens, answers[0].batch_prefill_s
    print(f"dtpvit: {tokens} visual tokens, prefill {1e3 * seconds:.1f} ms", file=sys.stderr)


def _image(name: str) -> Image.Image:
    try:
        return decode_image(Path(name).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"the image {name} cannot be read ({error.strerror}); give a JPEG, PNG or WebP file") from error
    except SkippedSample as error:
        raise UserError(f"the image {name} is no whole image ({error.cause}); give a JPEG, PNG or WebP file") from error
