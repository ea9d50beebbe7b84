"""Class paths in files of other people's making."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dtpvit.errors import UserError

__all__ = ["check_classes"]

_CLASS_PATH = re.compile(r"class_path\W+([A-Za-z_]\w*)\.")


def check_classes(values: Any, path: Path) -> None:
    """Refuse a class path that leads into the folder that the file itself came in.

    The working folder is on Python's path, for classes of the user's own; a folder below it, fetched from elsewhere,
    could thus bring along the module that its checkpoint or config names, and building the model would run it.

    Args:
        values: The file's content, as far as a model is built from it; it may hold JSON as text.
        path: The file.

    Raises:
        UserError: If a class is of a package that is not imported yet and in which the file lies.
    """
    for package in set(_CLASS_PATH.findall(unquote(str(values)))) - set(sys.modules):
        spec = find_spec(package)
        folders = [Path(folder).resolve() for folder in (spec and spec.submodule_search_locations) or ()]
        if any(path.resolve().is_relative_to(folder) for folder in folders):
            raise UserError(
                f"{path} names a class of {package}, the folder that it lies in, which would run what came with it; "
                "if it is your own, move the file out of the folder"
            )
