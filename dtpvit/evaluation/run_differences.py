"""Where the configs of several runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["differences", "flattened"]

_FOLLOWS_FROM_THE_NAME = ("name", "checkpoint.dirpath", "trainer.default_root_dir")


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ, with the value in each config; empty where a config lacks the key.

    >>> differences([{"model": {"depth": 4, "dim": 8}}, {"model": {"depth": 6, "dim": 8}}])
    [('model.depth', ['4', '6'])]
    """
    flat = [flattened(config) for config in configs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in _FOLLOWS_FROM_THE_NAME]
    return [(key, values) for key in keys if len(set(values := [one.get(key, "") for one in flat])) > 1]


def flattened(config: Any, prefix: str = "") -> dict[str, str]:
    """Every value by the path to it, as JSON but texts without quotes.

    >>> flattened({"a": {"b": [1, {"c": "x"}]}, "d": {}})
    {'a.b.0': '1', 'a.b.1.c': 'x', 'd': '{}'}
    """
    if isinstance(config, Mapping) and config:
        parts = config.items()
    elif isinstance(config, list) and any(isinstance(value, Mapping | list) for value in config):
        parts = enumerate(config)
    else:
        return {prefix: config if isinstance(config, str) else json.dumps(config, default=str, ensure_ascii=False)}
    found = dict[str, str]()
    for key, value in parts:
        found |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return found
