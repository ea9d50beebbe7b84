"""Which shards a specification names, and how many samples they hold."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import braceexpand

from dtpvit.errors import UserError
from dtpvit.json_input import parse_json

__all__ = [
    "count_samples",
    "expand_shards",
    "is_local",
    "missing_shards",
    "named_shards",
    "shard_counts",
    "shard_stats",
    "shard_stem",
    "sum_counts",
]

_ENDINGS = (".tar", ".tar.gz", ".tgz")
_MOST_SAMPLES = 1 << 40  # beyond, a number is a mistake, and not every library can count so far
_REMOTE = re.compile(r"^([a-z][a-z0-9+.-]+://|pipe:)")


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """Paths and addresses of all shards that ``spec`` names, in order, each once.

    ``spec`` is a path, a brace list (``cc12m/{00000..01242}.tar``), a glob, a folder (its tars), several of
    these joined by ``::``, or a list of these. Shards in which img2dataset stored nothing are left out.

    >>> expand_shards("pipe:aws s3 cp s3://bucket/{0..1}.tar -")
    ['pipe:aws s3 cp s3://bucket/0.tar -', 'pipe:aws s3 cp s3://bucket/1.tar -']

    Raises:
        UserError: If a part of ``spec`` names nothing, or a local shard is not there.
    """
    named = named_shards(spec)
    shards = [shard for shard, count in zip(named, shard_counts(named), strict=True) if count != 0]
    if not shards:
        raise UserError(f"All {len(named)} shards of {spec!r} are empty by their _stats.json; download them again.")
    return shards


def named_shards(spec: str | Sequence[str]) -> list[str]:
    """What ``expand_shards`` gives, with the shards in which img2dataset stored nothing.

    Raises:
        UserError: As ``expand_shards`` does.
    """
    parts = [part for entry in ([spec] if isinstance(spec, str) else spec) for part in entry.split("::")]
    parts = [part.strip() for part in parts if part.strip()]
    if not parts:
        raise UserError(
            f"No shards are named by {spec!r}; give a folder, a glob or a list like '{{00000..00009}}.tar'."
        )
    return list(dict.fromkeys(shard for part in parts for shard in _expand_part(part)))


def shard_counts(shards: Sequence[str]) -> list[int | None]:
    """Samples of each shard by img2dataset's ``_stats.json`` or else a ``sizes.json`` beside it; None without."""
    folders = {str(Path(shard).parent) for shard in shards if is_local(shard)}
    sizes = {folder: _load_mapping(Path(folder, "sizes.json")) for folder in folders}
    counts = list[int | None]()
    for shard in shards:
        stats = shard_stats(shard) or {}
        counts.append(_number(stats.get("successes", sizes.get(str(Path(shard).parent), {}).get(Path(shard).name))))
    return counts


def shard_stats(shard: str) -> dict[str, Any] | None:
    """What img2dataset's ``_stats.json`` beside a local shard holds; None if it holds no number of ``successes``.

    Its ``count`` of addresses is at least the successes, and its ``status_dict`` holds numbers that sum to it.
    """
    stem = shard_stem(shard)
    if not is_local(shard) or stem == shard:
        return None
    stats = _load_mapping(Path(f"{stem}_stats.json"))
    if (successes := _number(stats.get("successes"))) is None:
        return None
    statuses = stats.get("status_dict")
    numbers = {text: _number(number) or 0 for text, number in statuses.items()} if isinstance(statuses, dict) else {}
    numbers["success"] = successes
    count = max(_number(stats.get("count")) or 0, sum(numbers.values()))
    # img2dataset keeps 100 statuses of a shard at most, and shards of other makers may have none.
    if rest := count - sum(numbers.values()):
        numbers["cause not recorded"] = rest
    return stats | {"count": count, "status_dict": numbers}


def shard_stem(shard: str) -> str:
    """The shard without its ending: ``cc12m/00000`` of ``cc12m/00000.tar``."""
    return next((shard.removesuffix(ending) for ending in _ENDINGS if shard.endswith(ending)), shard)


def count_samples(shards: Sequence[str]) -> int | None:
    """Samples of all shards together, or None if even one of them has no ``_stats.json``."""
    return sum_counts(shard_counts(shards))


def sum_counts(counts: Sequence[int | None]) -> int | None:
    """Their sum, or None if even one is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def is_local(shard: str) -> bool:
    """True for a path of this machine, false for an address or a ``pipe:`` command."""
    return _REMOTE.match(shard) is None


def missing_shards(shards: Sequence[str]) -> list[str]:
    """The local shards that are not files."""
    return [shard for shard in shards if is_local(shard) and not Path(shard).is_file()]


def _expand_part(part: str) -> list[str]:
    """One path, brace list, glob or folder -> shards."""
    expanded = list(braceexpand.braceexpand(part)) if "{" in part else [part]
    if not is_local(part):
        return expanded
    shards = [shard for item in expanded for shard in _expand_local(Path(item).expanduser(), part)]
    if len(expanded) == 1 and missing_shards(shards) == shards == [str(Path(part).expanduser())]:
        raise UserError(f"{part} does not exist; give a folder of .tar shards, a brace list or a glob.")
    if missing := missing_shards(shards):
        raise UserError(
            f"{len(missing)} of the {len(shards)} shards of {part!r} do not exist, the first is "
            f"{missing[0]!r}; correct the range or download them."
        )
    return shards


def _expand_local(path: Path, part: str) -> list[str]:
    text = str(path)
    if path.is_dir():
        found = [str(child) for child in path.iterdir() if child.name.endswith(_ENDINGS) and child.is_file()]
        wanted = "a folder with *.tar shards"
    elif any(letter in text for letter in "*?["):
        found = [name for name in glob.glob(text, recursive=True) if name.endswith(_ENDINGS)]
        wanted = "a glob that matches *.tar shards"
    else:
        return [text]
    if not found:
        raise UserError(f"No shards are at {part!r}, which should be {wanted}; correct the path or download the data.")
    return sorted(found)


def _load_mapping(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where it is absent or unreadable."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_SAMPLES else None
