"""Options that reach into a mapping of a config, merged into what the config says there, at any depth.

jsonargparse (4.53) merges at the first level alone: ``--model.init_args.model.vision.dim 64`` would leave of ``vision``
nothing but the width, and an encoder of another depth and patch size would be trained without a word.
"""

import math
from copy import deepcopy
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from dtpvit._shorthands import options
from dtpvit.errors import UserError

__all__ = ["parse_merged"]


def parse_merged(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """What ``parser.parse_args`` gives, with options below the first level of a mapping merged into it.

    Args:
        parser: Of a LightningCLI, with subcommands; it must not exit on an error.
        arguments: The subcommand and its arguments. Options into a mapping count after everything else.

    Raises:
        UserError: If an option leads into what is no mapping.
    """
    # At least --model.model.vision.dim; whether "model" is a mapping or a class is known when all is parsed.
    deep = [found for found in options(arguments) if found[2].startswith("--") and found[2].count(".") >= 3]
    if not deep:
        return parser.parse_args(arguments)
    base = _parsed_without(parser, arguments, deep)
    into_mappings = [found for found in deep if _place(base, found[2]) is not None]
    if len(into_mappings) < len(deep):
        base = _parsed_without(parser, arguments, into_mappings)
    merged = dict[str, dict[Any, Any]]()
    for _, _, option, value in into_mappings:
        place = _place(base, option)
        assert place is not None
        path, mapping, keys = place
        _put(merged.setdefault(path, deepcopy(mapping)), keys, _value(value), option)
    dumped = [
        yaml.safe_dump(content, default_flow_style=True, width=math.inf, sort_keys=False) for content in merged.values()
    ]
    others = _without(arguments, into_mappings)  # each where it stood: what is said of a callback follows the callback
    return parser.parse_args(others + [f"--{path}={text}" for path, text in zip(merged, dumped, strict=True)])


def _parsed_without(parser: ArgumentParser, arguments: list[str], found: list[tuple[int, int, str, str]]) -> Namespace:
    """The subcommand's config as it is without these options."""
    try:
        return _parsed(parser, _without(arguments, found))
    except Exception:  # a required argument is among them
        config = _parsed(parser, arguments)
    for _, _, option, _ in found:
        if (place := _place(config, option)) is not None:
            _drop(place[1], place[2][0])  # of which jsonargparse kept the last option alone
    return config


def _parsed(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """The subcommand's config, without printing it."""
    silent = [argument for argument in arguments if not argument.startswith("--print_config")]
    return parser.parse_args(silent)[arguments[0]]


def _without(arguments: list[str], found: list[tuple[int, int, str, str]]) -> list[str]:
    taken = {place for index, width, _, _ in found for place in range(index, index + width)}
    return [argument for place, argument in enumerate(arguments) if place not in taken]


def _place(config: Namespace, option: str) -> tuple[str, dict[Any, Any], list[str]] | None:
    """The path of the mapping that an option leads into, the mapping, and the rest of the path if longer than a key."""
    keys, path = option.removeprefix("--").split("."), list[str]()
    node: Any = config
    while keys:
        if node is None or isinstance(node, dict):
            return (".".join(path), node or {}, keys) if len(keys) > 1 else None
        if isinstance(node, str):
            raise UserError(f"{option} leads into {path[-1]}, which is {node!r}: expected a mapping.")
        if not isinstance(node, Namespace):
            return None
        step = "init_args" if "class_path" in node and keys[0] not in ("class_path", "init_args") else keys.pop(0)
        path.append(step)
        node = node.get(step)
    return None


def _drop(mapping: dict[Any, Any], word: str) -> None:
    """Forget the key that reads so, and such as "vision.dim", jsonargparse's where there was no mapping before."""
    for key in [key for key in mapping if str(key) == word or str(key).startswith(f"{word}.")]:
        del mapping[key]


def _put(mapping: dict[Any, Any], keys: list[str], value: Any, option: str) -> None:
    *ways, last = keys
    for way in ways:
        key = _key(mapping, way)
        if mapping.get(key) is None:
            mapping[key] = {}
        mapping = mapping[key]
        if not isinstance(mapping, dict):
            raise UserError(f"{option} leads into {way}, which is {mapping!r}: expected a mapping.")
    mapping[_key(mapping, last)] = value


def _key(mapping: dict[Any, Any], word: str) -> Any:
    """The key that reads so, which may be a number."""
    return next((key for key in mapping if str(key) == word), word)


def _value(text: str) -> Any:
    """What jsonargparse makes of it, which reads numbers that YAML takes for text, like 1e-5."""
    reader = ArgumentParser(exit_on_error=False)
    reader.add_argument("--value", type=Any)
    return reader.parse_args([f"--value={text}"]).value
