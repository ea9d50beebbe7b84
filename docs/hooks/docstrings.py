"""Griffe extension: what docstrings name, as in ``:class:`Tokens```, becomes a link, and doctests become code."""

from __future__ import annotations

import logging
import re

import griffe

logger = logging.getLogger("mkdocs.hooks.docstrings")
_DOCTEST = re.compile(r"^>>> .*(?:\n.*\S.*)*", re.MULTILINE)
_CODE_OR_ANGLE = re.compile(rf"`[^`]*`|{_DOCTEST.pattern}|<(?=\w)", re.MULTILINE)
_SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.+(?:\n     .+)*)", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`([\w.]+)`")


class DocstringPages(griffe.Extension):
    """What the package documents is linked; anything else, such as a method of torch's, stays code."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        self._walk(pkg, pkg)

    def _walk(self, thing: griffe.Object, package: griffe.Module) -> None:
        if thing.docstring:
            # <x, y> is an inner product and <wnid> a name, which a browser would take for tags.
            text = _CODE_OR_ANGLE.sub(lambda found: "&lt;" if found[0] == "<" else found[0], thing.docstring.value)
            text = _SEVERAL.sub(_one_by_one, text)
            text = _ROLE.sub(lambda role: _link(role[1], thing, package), text)
            thing.docstring.value = _DOCTEST.sub(lambda doctest: f"```pycon\n{doctest[0]}\n```", text)
        for member in thing.members.values():
            if isinstance(member, griffe.Object):
                self._walk(member, package)


def _one_by_one(found: re.Match[str]) -> str:
    """A line for each of several parameters, for griffe knows only those that have one."""
    return "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", "))


def _link(name: str, thing: griffe.Object, package: griffe.Module) -> str:
    found = _found(name.lstrip("."), thing, package)
    if found is None and name.startswith(f"{package.path}."):
        logger.warning("the docstring of %s names %s, which is not there", thing.path, name)
    label = name.lstrip(".")
    return f"`{label}`" if found is None or not _has_entry(found, package) else f"[`{label}`][{found.path}]"


def _found(name: str, thing: griffe.Object, package: griffe.Module) -> griffe.Object | None:
    """What ``name`` is where ``thing`` stands: a whole path, or a name of its class, its module or the package."""
    first, *rest = name.split(".")
    scope: griffe.Object | None = thing
    try:
        if first == package.name:
            return _final(package[".".join(rest)])
        while scope is not None:
            if first in scope.members:
                return _final(scope[name])
            scope = scope.parent  # pyright: ignore[reportAssignmentType]
    except (KeyError, griffe.GriffeError):
        pass
    return None


def _final(found: griffe.Object | griffe.Alias) -> griffe.Object | None:
    return found.final_target if isinstance(found, griffe.Alias) else found  # pyright: ignore[reportReturnType]


def _has_entry(found: griffe.Object, package: griffe.Module) -> bool:
    """Whether a page of the reference shows it: it has a docstring, and a public name in a public module."""
    parts = found.path.split(".")
    return bool(found.docstring) and parts[0] == package.name and not any(part.startswith("_") for part in parts)
