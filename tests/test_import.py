"""What importing dtpvit does, and above all what it does not do."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

import dtpvit
from dtpvit._import_hook import AfterImport


def python(code: str, *flags: str) -> str:
    """Standard output of ``code`` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_the_standard_library_only() -> None:
    code = """
import resource, sys
before, start = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF)
import dtpvit
assert "create_clip" in dir(dtpvit)
end = resource.getrusage(resource.RUSAGE_SELF)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded - sys.stdlib_module_names - {"dtpvit"}))
print(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
"""
    foreign, seconds = python(code).splitlines()
    assert foreign == "[]"
    assert float(seconds) < 0.3


def test_the_encoder_package_loads_torch_and_no_other_library_of_ours() -> None:
    code = "import dtpvit.encoder, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(python(code).split())
    assert "torch" in loaded
    assert not loaded & {"timm", "open_clip", "lightning", "torchvision", "webdataset", "torchmetrics"}


def test_the_encoder_package_names_torch_only() -> None:
    """torch imports numpy where it finds it, so what counts is what our files name."""
    assert dtpvit.__file__ is not None
    files = sorted((Path(dtpvit.__file__).parent / "encoder").rglob("*.py"))
    assert len(files) > 5
    allowed = sys.stdlib_module_names | {"torch", "dtpvit"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "" for _ in (0,) if isinstance(node, ast.ImportFrom)]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{file.name}: {names}"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="create_klip"):
        dtpvit.create_klip  # noqa: B018


@pytest.mark.parametrize(
    "order",
    [
        "dtpvit, timm, open_clip",
        "open_clip, timm, dtpvit",
        # Ours import timm and open_clip, whose registration imports ours: the circle must close.
        "dtpvit.interop.timm_models, dtpvit.interop.open_clip_models, open_clip, timm",
    ],
)
def test_open_clip_and_timm_know_our_models_in_any_order_of_import(order: str) -> None:
    code = f"""
import {order}
assert "DTP-ViT-B-32-10x" in open_clip.list_models()
assert timm.list_models("dtp_vit*")
"""
    python(code, "-W", "error:dtpvit could not register")


# The hook itself, on packages made for the purpose.


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A folder of importable modules whose imports are watched, and the record of what the watch reported."""
    for name, text in {
        "alpha": "import beta\ncomplete = True\n",
        "beta": "value = 1\n",
        "broken": "raise RuntimeError('broken itself')\n",
        "circular": "import circular.part\ncomplete = True\n",
        "circular.part": "import circular\nearly = hasattr(circular, 'complete')\n",
        "ours": "",
        "ours.inner": "import beta\nfrom ours import deeper\nready = True\n",
        "ours.deeper": "import alpha\n",
    }.items():
        package, _, module = name.partition(".")
        file = tmp_path / package / f"{module or '__init__'}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (tmp_path / "alpha" / "data.txt").write_text("some data")

    record: list[str] = []

    def report(name: str) -> None:
        inner = sys.modules.get("ours.inner")
        assert inner is None or hasattr(inner, "ready"), "reported while our own module was half imported"
        assert hasattr(sys.modules.get("alpha", sys), "complete" if "alpha" in sys.modules else "path")
        record.append(name)

    watched = ("alpha", "beta", "broken", "circular", "absent")
    actions = {name: lambda name=name: report(name) for name in watched}
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [AfterImport(actions, package="ours"), *sys.meta_path])
    yield record
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_hook_reports_a_module_once_it_is_complete(calls: list[str]) -> None:
    importlib.import_module("alpha")
    assert sorted(calls) == ["alpha", "beta"]
    importlib.import_module("alpha")
    assert sorted(calls) == ["alpha", "beta"]


def test_the_hook_waits_for_our_own_package(calls: list[str]) -> None:
    importlib.import_module("ours.inner")
    assert sorted(calls) == ["alpha", "beta"]


def test_the_hook_reports_a_reload(calls: list[str]) -> None:
    importlib.reload(importlib.import_module("beta"))
    assert calls == ["beta", "beta"]


def test_looking_for_a_module_imports_and_reports_nothing(calls: list[str]) -> None:
    spec = importlib.util.find_spec("alpha")
    assert spec is not None and spec.origin is not None and spec.origin.endswith("__init__.py")
    assert importlib.util.find_spec("absent") is None
    assert "alpha" not in sys.modules and calls == []


def test_a_module_that_fails_fails_as_it_would_without_the_hook(calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="broken itself"):
        importlib.import_module("broken")
    with pytest.raises(ModuleNotFoundError, match="absent"):
        importlib.import_module("absent")
    assert calls == [] and "broken" not in sys.modules


def test_a_circular_import_is_reported_once(calls: list[str]) -> None:
    part = importlib.import_module("circular.part")
    assert part.early is False and calls == ["circular"]


def test_source_and_data_of_a_watched_package_are_found(calls: list[str]) -> None:
    alpha = importlib.import_module("alpha")
    assert "import beta" in inspect.getsource(alpha)
    assert (resources.files(alpha) / "data.txt").read_text() == "some data"


def test_modules_of_one_archive_are_told_apart(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("beta.py", "value = 2\n")
        archive.writestr("gamma.py", "import beta\n")
    monkeypatch.syspath_prepend(tmp_path / "archive.zip")
    importlib.import_module("gamma")
    assert sys.modules["beta"].value == 2
    assert calls == ["beta"]


def test_a_failing_registration_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "delta.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    finder = AfterImport({"delta": lambda: [][0]}, package="ours")
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.warns(UserWarning, match="could not register its models with delta"):
        assert importlib.import_module("delta").value == 3
    del sys.modules["delta"]
