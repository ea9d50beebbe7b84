"""Class names and prompt templates: the text half of a zero-shot classifier."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtpvit.errors import UserError

__all__ = ["Template", "load_classnames", "load_templates"]

_PLACEHOLDER = re.compile(r"\{c?\}")


@dataclass(frozen=True)
class Template:
    """A prompt with one or more places, ``{c}`` or ``{}``, for the class name.

    >>> Template("a photo of a {c}.")("tench")
    'a photo of a tench.'
    """

    pattern: str

    def __call__(self, name: str) -> str:
        # One pass with a function, so that braces or backslashes inside a class name stay as they are.
        return _PLACEHOLDER.sub(lambda _: name, self.pattern)


def load_classnames(spec: str | list[str] | None) -> list[str]:
    """Class names in label order.

    Args:
        spec: None for open_clip's 1,000 ImageNet names; a list, taken as it is; or a file, one name a line.

    Raises:
        UserError: No such file, a file that is no text, no names, or an empty line between two names
            (which would shift every later label by one).
    """
    if spec is None:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    source = "the list of class names" if isinstance(spec, list) else f"{spec}"
    names = [name.strip() for name in (spec if isinstance(spec, list) else _lines(spec, "class names"))]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{source} holds no class names: write one name a line, in label order.")
    if "" in names:
        raise UserError(
            f"{source} has an empty name in place {names.index('') + 1} of {len(names)}, which would shift "
            "the labels after it: write one name a line, in label order, without gaps."
        )
    return names


def load_templates(spec: str) -> list[Callable[[str], str]]:
    """Prompt templates: functions of a class name.

    Args:
        spec: "openai" (open_clip's 80 ImageNet templates), "simple" (7 of them), "none" (the bare name), or a
            text file with one template a line, ``{c}`` or ``{}`` standing for the name; empty lines are
            ignored.

    Raises:
        UserError: Neither a known set nor a file, an empty file, or a line without a placeholder.
    """
    if spec == "none":
        return [Template("{c}")]
    if spec in ("openai", "simple"):
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES if spec == "openai" else SIMPLE_IMAGENET_TEMPLATES)
    lines = _lines(spec, "templates (nor is it one of the sets openai, simple, none)")
    templates: list[Callable[[str], str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not _PLACEHOLDER.search(line):
            raise UserError(
                f"{spec}, line {number}: {line.strip()!r} has no place for the class name: write {{c}} or {{}} there."
            )
        templates.append(Template(line.strip()))
    if not templates:
        raise UserError(f"{spec} holds no templates: write one a line, such as 'a photo of a {{c}}.'")
    return templates


def _lines(path: str, what: str) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path} is no file of {what}: give the path of a text file, one entry a line.")
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}): give a plain text file.") from error
