"""No file that is read can run code: what could is not in the source, walked as a syntax tree.

Allowed are two ways that the user writes down: a shard named ``pipe:COMMAND`` (run by webdataset's ``gopen``), and
``class_path`` in a config, which imports what it names.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("dtpvit", "benchmarks", "data") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "tempfile.mktemp"),
    *("subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("shutil.unpack_archive", "pandas.read_pickle", "torch.hub.load", "torch.package.PackageImporter"),
}
FORBIDDEN = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def dangers(source: str) -> list[str]:
    """Whatever could run code, or write outside of its folder, that a file brings along."""
    return [f"line {node.lineno}: {found}" for node in ast.walk(ast.parse(source)) if (found := danger(node))]


def danger(node: ast.AST) -> str | None:
    if isinstance(node, ast.Import):
        return next((alias.name for alias in node.names if alias.name.split(".")[0] in MODULES), None)
    if isinstance(node, ast.ImportFrom):
        return node.module if (node.module or "").split(".")[0] in MODULES else None
    if not isinstance(node, ast.Call):
        return None
    name, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    constants = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
    if name in CALLS:
        return name
    if wrong := [key for key, value in FORBIDDEN.items() if constants.get(key) is value]:
        return f"{name} with {wrong[0]}={FORBIDDEN[wrong[0]]}"
    if name == "torch.load" and constants.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if name.rpartition(".")[2] in ("extract", "extractall") and constants.get("filter") != "data":
        return f"{name} without filter='data'"
    return None


def test_the_source_is_found():
    assert len(SOURCES) > 150


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_can_run(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\nx = torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=safe)",
        "Task.load_from_checkpoint(p, weights_only=False)",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(command, shell=True)",
        "subprocess.Popen(command, shell=True)",
        "os.system(command)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "tar.extractall(folder)",
        "tar.extract(member, folder, filter='fully_trusted')",
        "zip.extractall(folder)",
    ],
)
def test_what_could_is_seen(source):
    assert len(dangers(source)) >= 1


def test_what_cannot_is_let_pass():
    fine = "model.eval()\ntorch.load(p, weights_only=True)\nsubprocess.run(['aws', p])\nyaml.safe_load(t)\nnp.load(p)\n"
    assert (
        dangers(fine + "tar.extractall(p, filter='data')\nre.compile(x)\ntorch.compile(m)\nsafetensors.load(p)") == []
    )
