"""Reducers as plain values: what a YAML, a checkpoint and a JSON model config can hold."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from dtpvit.encoder import reducers as built_in
from dtpvit.encoder.reducers import TokenReducer
from dtpvit.encoder.vision import ReducerMaker
from dtpvit.errors import UserError

__all__ = ["reducer_makers"]


def reducer_makers(config: Mapping[Any, Any] | None) -> dict[int, TokenReducer | ReducerMaker]:
    """Makers behind ``{block: {"class_path": ..., "init_args": {...}}}``.

    A class path without a dot names a class of :mod:`dtpvit.encoder.reducers`. Reducers and callables pass through.

    Raises:
        UserError: If a block is no number, or a class is unknown or no reducer.
    """
    return {_block(block): _maker(entry) for block, entry in (config or {}).items()}


def _block(key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise UserError(f"a reducer is placed before block {key!r}; expected the number of a block") from None


def _maker(entry: Any) -> TokenReducer | ReducerMaker:
    if isinstance(entry, TokenReducer):
        return entry
    if callable(entry):
        return cast(ReducerMaker, entry)
    if not isinstance(entry, Mapping) or "class_path" not in entry:
        raise UserError(f"a reducer is given as {entry!r}; expected class_path and, where needed, init_args")
    unknown = set(entry) - {"class_path", "init_args"}
    if unknown:
        raise UserError(f"a reducer has the unknown entries {sorted(unknown)}; arguments belong under init_args")
    return partial(_find(str(entry["class_path"])), **dict(entry.get("init_args") or {}))


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
