"""What ``dtpvit data check`` prints: problems by cause, percentiles, a histogram of caption lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import ceil
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["caption_histogram", "percentiles", "show_report"]

_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_EDGES = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)
_BAR = 40
_EXAMPLES = 3


def percentiles(sizes: Counter[tuple[int, int]], lengths: Counter[int]) -> dict[str, dict[str, float]]:
    """Least, 1st, 5th, 25th, 50th, 75th, 95th, 99th percentile and greatest of each quantity; {} for none."""
    quantities = {
        "width": _by(sizes, lambda width, height: width),
        "height": _by(sizes, lambda width, height: height),
        "short side": _by(sizes, min),
        "width / height": _by(sizes, lambda width, height: round(width / height, 3)),
        "caption, characters": lengths,
    }
    return {name: _nearest_ranks(counted) for name, counted in quantities.items() if counted}


def caption_histogram(lengths: Counter[int]) -> dict[str, int]:
    """How many captions have a number of characters within each range, up to the longest.

    >>> caption_histogram(Counter({5: 2, 40: 1}))
    {'1-15': 2, '16-31': 0, '32-63': 1}
    """
    bins = {f"{low}-{high - 1}": (low, high) for low, high in pairwise(_EDGES)}
    bins[f"{_EDGES[-1]}-"] = (_EDGES[-1], max(lengths, default=0) + 1)
    counted = {
        name: sum(n for length, n in lengths.items() if low <= length < high) for name, (low, high) in bins.items()
    }
    last = max((place for place, number in enumerate(counted.values()) if number), default=-1)
    return dict(list(counted.items())[: last + 1])


def show_report(record: Mapping[str, Any], problems: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Print a check's record."""
    share = 100 * record["usable"] / max(1, record["samples"])
    usable, samples = record["usable"], record["samples"]
    print(f"{usable:,} of {samples:,} samples are usable ({share:.4g} %), in {record['shards']:,} shards.")
    console = Console(highlight=False)
    if problems:
        console.print(_problems(problems))
    else:
        print("Nothing is wrong with them.")
    if record["empty_shards"]:
        print(f"{record['empty_shards']:,} shards are empty, as their _stats.json says; training leaves them out.")
    shared = record["keys_in_several_shards"]
    if shared["number"]:
        key, where = next(iter(shared["examples"].items()))
        names = " and ".join(PurePath(shard).name for shard in where[:2])
        print(f"{shared['number']:,} keys occur in several shards ({key} in {names}), which is no harm to training.")
    if record["percentiles"]:
        console.print()
        console.print(_quantities(record["percentiles"]))
    if histogram := record["caption_lengths"]:
        print("\ncaptions by characters")
        widest = max(histogram.values())
        for name, number in histogram.items():
            print(f"{name:>11}  {number:>12,}  {'█' * ceil(_BAR * number / widest)}")


def _by(sizes: Counter[tuple[int, int]], quantity: Callable[[int, int], float]) -> Counter[float]:
    """How many images have each value of a quantity of width and height."""
    counted: Counter[float] = Counter()
    for (width, height), number in sizes.items():
        counted[quantity(width, height)] += number
    return counted


def _nearest_ranks(counted: Counter[Any]) -> dict[str, float]:
    total, below, ranks = counted.total(), 0, {}
    wanted = {percent: max(1, ceil(percent / 100 * total)) for percent in _PERCENTILES}
    for value in sorted(counted):
        below += counted[value]
        for percent, rank in wanted.items():
            if str(percent) not in ranks and below >= rank:
                ranks[str(percent)] = value
    return ranks


def _problems(problems: Mapping[str, Sequence[tuple[str, str]]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("found")
    table.add_column("", justify="right")
    table.add_column("for instance")
    for cause, found in sorted(problems.items(), key=lambda item: -len(item[1])):
        examples = "\n".join(f"{PurePath(shard).name}: {where}" for shard, where in found[:_EXAMPLES])
        table.add_row(Text(cause), f"{len(found):,}", Text(examples))
    return table


def _quantities(quantities: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for percent in _PERCENTILES:
        title = {0: "least", 50: "median", 100: "most"}.get(percent, f"{percent} %")
        table.add_column(title, justify="right")
    for name, values in quantities.items():
        table.add_row(
            name, *(f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" for value in values.values())
        )
    return table
