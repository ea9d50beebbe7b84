"""YAML of other people's making."""

from typing import Any

import yaml

__all__ = ["parse_yaml"]


def parse_yaml(text: str) -> Any:
    """What ``yaml.safe_load`` gives, with one exception for all that can be wrong.

    Raises:
        yaml.YAMLError: Also for numbers of thousands of digits, days that are in no calendar, and brackets nested
            deeper than Python reads.
    """
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError("nested too deep" if isinstance(error, RecursionError) else str(error)) from None
