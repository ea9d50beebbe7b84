"""How large a part of the training data cannot be used, and when that is too much."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dtpvit.errors import UserError

__all__ = ["LEAST_SEEN", "Examples", "Seen", "check_max_skipped", "too_many_bad"]

LEAST_SEEN = 500
"""Samples before which no share is judged: in a small data set the first broken file is a large one."""

_EXAMPLES = 3  # of a cause, from each worker
_NAMED = 2  # of a cause, in the sentence


class Seen(NamedTuple):
    """Numbers of samples, to be added up over workers and ranks.

    Attributes:
        found: Read, and whole as far as reading can tell.
        lost: Left out in reading.
        tried: Of the found, those decoded up to now; others may wait to be shuffled.
        usable: Of the tried.
    """

    found: int = 0
    lost: int = 0
    tried: int = 0
    usable: int = 0

    @property
    def number(self) -> int:
        """Samples of which it is known whether they can be used."""
        return self.lost + self.tried

    @property
    def bad(self) -> float:
        """Share of the samples that cannot be used, from 0 to 1.

        Reading may be thousands of samples ahead of decoding, so that each has a share of its own.
        """
        read = self.found / (self.found + self.lost) if self.lost else 1.0
        return 1 - read * (self.usable / self.tried if self.tried else 1.0)


class Examples:
    """The first few bad samples of each cause."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._new: list[tuple[str, str]] = []

    def add(self, cause: str, where: str) -> None:
        """Keep it, if there are not enough of the cause."""
        if where and self._counts[cause] < _EXAMPLES:
            self._counts[cause] += 1
            self._new.append((cause, where))

    def new(self) -> list[tuple[str, str]]:
        """Causes and places since this was last asked."""
        found, self._new = self._new, []
        return found


def check_max_skipped(share: float) -> float:
    """Refuse what is no share, by a UserError."""
    if not 0 <= share <= 1:
        raise UserError(
            f"max_skipped is {share}; give the share of bad samples that is allowed, from 0 to 1 (never stop)."
        )
    return share


def too_many_bad(
    seen: Seen, max_skipped: float, causes: Mapping[str, int], examples: list[tuple[str, str]]
) -> UserError | None:
    """What to raise if more than the share ``max_skipped`` of at least ``LEAST_SEEN`` samples is bad; None if not."""
    if max_skipped >= 1 or seen.number < LEAST_SEEN or seen.bad <= max_skipped:
        return None
    counts = ", ".join(f"{cause}: {count}" for cause, count in causes.items() if count)
    named = [
        where for cause in causes for where in [one for one in dict.fromkeys(examples) if one[0] == cause][:_NAMED]
    ]
    such_as = ", ".join(f"{' '.join(where.split())[:200]} ({cause})" for cause, where in named)
    return UserError(
        f"{seen.bad:.0%} of the training samples are bad, judged by {seen.number:,} ({counts}; such as {such_as}), "
        f"where max_skipped allows {max_skipped:.0%}: look for the cause (`dtpvit data check` reads shards), or allow "
        "more with --data.init_args.max_skipped."
    )
