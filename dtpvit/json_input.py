"""JSON of other people's making."""

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """What ``json.loads`` gives, with one exception for all that can be wrong.

    Raises:
        json.JSONDecodeError: Also for bytes that are no UTF-8, numbers of thousands of digits, and brackets nested
            deeper than Python reads.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise json.JSONDecodeError(what, "", 0) from None
