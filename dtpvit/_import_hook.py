"""Register our models with timm and open_clip when these are imported, before or after dtpvit.

A finder at the head of ``sys.meta_path`` lets the ordinary finders do their work and adds one step to the
loader that they return: after the module's own code has run, our registration runs. Nothing is imported
early, and a module that fails to import fails as it would without us. Standard library only.
"""

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["REGISTRARS", "AfterImport", "install"]

REGISTRARS: Mapping[str, str] = {
    "timm": "dtpvit.interop.timm_models",
    "open_clip": "dtpvit.interop.open_clip_models",
}
"""For each library, the module of ours whose ``register()`` (idempotent) makes our models known to it."""


class AfterImport(MetaPathFinder):
    """Calls ``actions[name]()`` each time that module ``name`` has been imported (or reloaded).

    Args:
        actions: For each top-level module name, what to do once its code has run.
        package: While a module of this package is being imported, actions wait until it is complete: our
            registration imports that package, and must not see half of it.
    """

    def __init__(self, actions: Mapping[str, Callable[[], None]], package: str) -> None:
        self.actions = actions
        self.package = package
        self._importing = threading.local()
        self._waiting: dict[str, Callable[[], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, its loader taught to tell us; None for all other modules."""
        if fullname not in self.actions and not f"{fullname}.".startswith(f"{self.package}."):
            return None
        spec = self._ask_the_others(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._teach(spec)
        return spec

    def _ask_the_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if isinstance(finder, AfterImport) or find is None:
                continue
            if (spec := find(fullname, path, target)) is not None:
                return spec
        return None

    def _teach(self, spec: ModuleSpec) -> None:
        # The loader keeps its class, so that inspect, pkgutil and importlib.resources see what they expect.
        # A zip archive shares one loader between its modules, hence the comparison of names.
        loader, name = spec.loader, spec.name
        run = getattr(loader, "exec_module", None)
        if run is None or getattr(run, "after_import", None) == name:
            return

        def exec_module(module: ModuleType) -> None:
            if module.__name__ != name:
                run(module)
                return
            self._importing.depth = self.depth + 1
            try:
                run(module)
                if name in self.actions:
                    self._waiting[name] = self.actions[name]
            finally:
                self._importing.depth -= 1
                self.flush()

        exec_module.after_import = name  # type: ignore[attr-defined]
        try:
            loader.exec_module = exec_module  # type: ignore[union-attr]
        except AttributeError:  # a loader with slots: its module works, only unregistered
            return

    @property
    def depth(self) -> int:
        """How many watched modules this thread is importing at the moment."""
        return getattr(self._importing, "depth", 0)

    def flush(self) -> None:
        """Do what waits, unless a watched module is half imported: open_clip imports timm, ours both."""
        while self._waiting and self.depth == 0:
            name = next(iter(self._waiting))
            action = self._waiting.pop(name)
            try:
                action()
            except Exception as error:  # somebody's `import timm` must not fail because of us
                warnings.warn(f"dtpvit could not register its models with {name}: {error!r}", stacklevel=2)

    def catch_up(self) -> None:
        """Do at once what concerns modules imported before this finder was installed."""
        self._waiting |= {name: action for name, action in self.actions.items() if name in sys.modules}
        specs = [getattr(sys.modules[name], "__spec__", None) for name in self._waiting]
        # One that is half imported, and imports us, waits for the next watched import.
        if not any(getattr(spec, "_initializing", False) for spec in specs):
            self.flush()


def _register(registrar: str) -> None:
    importlib.import_module(registrar).register()


def install() -> None:
    """Put the finder at the head of ``sys.meta_path``; a second call replaces the first one's finder."""
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__qualname__ != AfterImport.__qualname__]
    actions = {name: lambda registrar=registrar: _register(registrar) for name, registrar in REGISTRARS.items()}
    finder = AfterImport(actions, package="dtpvit.interop")
    sys.meta_path.insert(0, finder)
    finder.catch_up()
