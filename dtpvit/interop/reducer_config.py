"""Reducers as plain values: what a YAML, a checkpoint and a JSON model config can hold."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from dtpvit.encoder import reducers as built_in
from dtpvit.encoder.reducers import TokenReducer
from dtpvit.encoder.vision import ReducerMaker
from dtpvit.errors import UserError

__all__ = ["reducer_makers"]

_BLOCKS = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


def reducer_makers(config: Mapping[Any, Any] | None) -> dict[int, TokenReducer | ReducerMaker]:
    """Makers behind ``{blocks: {"class_path": ..., "init_args": {...}, "each": {...}}}``.

    ``blocks`` is the number of a block or names several, ``"3,6,9"`` or ``"0-11"``, of which each gets a reducer of its
    own. These are alike but for the arguments under ``each``, which hold a list of one value a block, or ``{"from": 16,
    "to": 0}`` for values at equal steps, rounded down where both ends are whole numbers. A class path without a dot
    names a class of :mod:`dtpvit.encoder.reducers`. Reducers and callables pass through.

    Raises:
        UserError: If a block is no number or has two reducers, a class is unknown or no reducer, or values do not fit
            the blocks.

    >>> made = reducer_makers({"0-2": {"class_path": "FixedStride", "each": {"compression": {"from": 3, "to": 1}}}})
    >>> [maker(8).compression for maker in made.values()]
    [3, 2, 1]
    """
    found: dict[int, TokenReducer | ReducerMaker] = {}
    for key, entry in (config or {}).items():
        blocks = _blocks(key)
        for block, maker in zip(blocks, _makers(entry, key, len(blocks)), strict=True):
            if block in found:
                raise UserError(f"block {block} is given two reducers, one of them by {key!r}; a block has one")
            found[block] = maker
    return found


def _blocks(key: Any) -> list[int]:
    found = list[int]()
    for part in str(key).split(","):
        match = _BLOCKS.fullmatch(part)
        blocks = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not blocks:
            raise UserError(
                f"a reducer is placed at block {key!r}; expected the number of a block, or several as '3,6,9' or '0-11'"
            )
        found += blocks
    return found


def _makers(entry: Any, key: Any, count: int) -> list[TokenReducer | ReducerMaker]:
    """One for each of ``count`` blocks."""
    if isinstance(entry, TokenReducer):
        if count > 1:
            raise UserError(f"one reducer is placed at blocks {key!r}; give what makes one, so that each has its own")
        return [entry]
    if callable(entry):
        return [cast(ReducerMaker, entry)] * count
    if not isinstance(entry, Mapping) or "class_path" not in entry:
        raise UserError(f"a reducer is given as {entry!r}; expected class_path and, where needed, init_args")
    unknown = set(entry) - {"class_path", "init_args", "each"}
    if unknown:
        raise UserError(f"a reducer has the unknown entries {sorted(unknown)}; arguments belong under init_args")
    reducer, arguments = _find(str(entry["class_path"])), dict(entry.get("init_args") or {})
    each = {name: _values(name, given, count) for name, given in (entry.get("each") or {}).items()}
    return [
        partial(reducer, **{**arguments, **{name: values[place] for name, values in each.items()}})
        for place in range(count)
    ]


def _values(name: str, given: Any, count: int) -> list[Any]:
    """The values of an argument for each of ``count`` blocks."""
    if isinstance(given, list | tuple) and len(given) == count:
        return list(given)
    if isinstance(given, Mapping) and set(given) == {"from", "to"}:
        ends = given["from"], given["to"]
        steps = max(1, count - 1)
        if all(isinstance(end, int) for end in ends):
            return [(ends[0] * (steps - place) + ends[1] * place) // steps for place in range(count)]
        if all(isinstance(end, int | float) for end in ends):
            return [(ends[0] * (steps - place) + ends[1] * place) / steps for place in range(count)]
    raise UserError(f"{name} of each block is given as {given!r}; expected a list of {count} values, or from and to")


def _find(class_path: str) -> type[TokenReducer]:
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name) if module_name else built_in, name, None)
    except ImportError as error:
        raise UserError(f"reducer {class_path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, TokenReducer)):
        known = [n for n in built_in.__all__ if n not in ("Evidence", "Reduction", "TokenReducer")]
        raise UserError(f"{class_path!r} is no token reducer; dtpvit has {', '.join(known)}")
    return found
