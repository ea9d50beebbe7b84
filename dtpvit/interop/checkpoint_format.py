"""The number of a checkpoint's format: older ones are brought up to date when they are read, newer ones refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtpvit.errors import UserError

__all__ = ["FORMAT", "FORMAT_KEY", "MIGRATIONS", "check_format", "migrate"]

FORMAT_KEY = "dtpvit_format"
"""Under which a checkpoint, an exported folder's config and a safetensors file's metadata record the number."""

FORMAT = 2
"""What is written now. Raise it by one, and add a step to ``MIGRATIONS``, when the same file comes to mean another
thing: a renamed parameter or option, another layout of the state. A new option with a default is no new format."""


def _first(content: dict[str, Any]) -> None:
    """1 to 2: until 2026-11-27 no number was recorded; what the files hold is the same."""


MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {1: _first}
"""For each older format what changes its content, in place, to that of the next."""


def check_format(number: object, source: object) -> int:
    """The number, if this version can read it.

    Args:
        number: As recorded; None is a file of before there were numbers.
        source: The file, for the message.

    Raises:
        UserError: If the format is a newer one, or no format at all.
    """
    if number is None:
        return 1
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{source} says {number!r} where the number of its format belongs; it is damaged or not ours")
    if number > FORMAT:
        from dtpvit import __version__

        raise UserError(
            f"{source} has format {number}, dtpvit {__version__} reads up to {FORMAT}; upgrade dtpvit to at least the "
            "version that wrote it"
        )
    return number


def migrate(content: dict[str, Any], source: object) -> bool:
    """Bring a checkpoint of ours to the present format, in place; files of others are left as they are.

    Returns:
        Whether it was of an older one.

    Raises:
        UserError: As :func:`check_format`.
    """
    if FORMAT_KEY not in content and "pytorch-lightning_version" not in content:
        return False
    number = found = check_format(content.get(FORMAT_KEY), source)
    while number < FORMAT:
        MIGRATIONS[number](content)
        number += 1
    content[FORMAT_KEY] = FORMAT
    return found < FORMAT
