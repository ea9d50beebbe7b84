"""Options into a mapping of a config leave the rest of it as it was, however deep they reach."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, Namespace

from dtpvit._merged_options import parse_merged
from dtpvit.cli import main
from dtpvit.errors import UserError

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MODEL = {"dim": 8, "vision": {"width": 128, "reducers": {2: {"rate": 4, "name": "2"}, "0-11": None}}}


class Task:
    def __init__(
        self, model: str | dict[str, Any], rate: float = 0.1, vision: dict[str, Any] | None = None
    ) -> None: ...


class Other(Task): ...


def parsed(folder: Path, *arguments: str, model: object = MODEL) -> Namespace:
    command = ArgumentParser(exit_on_error=False)
    command.add_argument("--config", action="config")
    command.add_subclass_arguments(Task, "model")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subcommands().add_subcommand("fit", command)
    config = {"model": {"class_path": "test_merged_options.Task", "init_args": {"model": model}}}
    if model:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    start = ["--config", str(folder / "config.yaml")] if model else []
    return parse_merged(parser, ["fit", *start, *arguments]).fit.model


def test_what_is_not_named_stays(tmp_path):
    deep = ["--model.init_args.model.vision.width=64", "--model.model.vision.reducers.2.rate", "1e-5"]
    found = parsed(tmp_path, *deep, "--model.init_args.rate", "0.5")
    expected = deepcopy(MODEL)
    expected["vision"]["width"], expected["vision"]["reducers"][2]["rate"] = 64, 1e-5
    assert found.init_args == Namespace(model=expected, rate=0.5, vision=None)
    found = parsed(tmp_path, "--model.init_args.vision.reducers.2.rate=3", "--model.vision.reducers.2.name", "a")
    assert found.init_args.vision == {"reducers": {"2": {"rate": 3, "name": "a"}}}


def test_values_may_be_mappings_and_ways_may_be_new(tmp_path):
    deep = ["--model.init_args.model.vision.reducers={}", "--model.init_args.model.text.block.heads=[1, 2]"]
    found = parsed(tmp_path, *deep).init_args.model
    assert found == {"dim": 8, "vision": {"width": 128, "reducers": {}}, "text": {"block": {"heads": [1, 2]}}}
    found = parsed(tmp_path, "--model.init_args.model.vision.reducers.0-11.rate=3").init_args.model
    assert found["vision"]["reducers"] == {**MODEL["vision"]["reducers"], "0-11": {"rate": 3}}


def test_all_may_stand_on_the_command_line(tmp_path):
    named = ["--model", "test_merged_options.Other"]
    deep = ["--model.model.vision.width=1", "--model.model.vision.depth=2", "--model.init_args.model.text.x.y=3"]
    found = parsed(tmp_path, *named, *deep, "--model.model.dim=4", model=None)
    assert found.class_path == "test_merged_options.Other"
    assert found.init_args.model == {"dim": 4, "vision": {"width": 1, "depth": 2}, "text": {"x": {"y": 3}}}
    assert parsed(tmp_path, *named, *deep, model=None).init_args.model.keys() == {"vision", "text"}


def test_options_of_every_depth_count(tmp_path):
    whole = "--model.init_args.model.vision={'width': 1, 'depth': 2}"
    found = parsed(tmp_path, "--model.init_args.model.dim=4", whole, "--model.init_args.model.vision.width=3")
    assert found.init_args.model == {"dim": 4, "vision": {"width": 3, "depth": 2}}


def test_an_option_may_stand_before_the_config(tmp_path):
    parsed(tmp_path)
    deep = ["--model.init_args.model.vision.width=1", "--config", str(tmp_path / "config.yaml")]
    assert parsed(tmp_path, *deep, model=None).init_args.model["dim"] == MODEL["dim"]


def test_a_way_through_a_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.vision\.width leads into model, which is 'small': expected a mapping"):
        parsed(tmp_path, "--model.init_args.model.vision.width=1", model="small")


def test_a_way_through_a_number_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.dim\.more leads into dim, which is 8: expected a mapping"):
        parsed(tmp_path, "--model.init_args.model.dim.more=1")


NAMES = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES | st.integers(0, 9), inner, max_size=3))


@settings(max_examples=40, deadline=None)
@given(tree=st.dictionaries(NAMES, TREES), keys=st.lists(NAMES | st.integers(0, 9), min_size=2, max_size=4))
def test_it_is_an_assignment(tree, keys, tmp_path_factory):
    expected = deepcopy(tree)
    node, way = expected, [str(keys[0]), *keys[1:]]
    for key in way[:-1]:
        if not isinstance(node.get(key, {}), dict):
            return
        node = node.setdefault(key if key in node or str(key) not in map(str, node) else str(key), {})
    node[way[-1]] = 7
    option = "--model.init_args.model." + ".".join(map(str, way)) + "=7"
    found = parsed(tmp_path_factory.mktemp("tree"), option, model=tree or {"z": 0}).init_args.model
    strings = lambda tree: {str(k): strings(v) if isinstance(v, dict) else v for k, v in tree.items()}  # noqa: E731
    assert strings(found) == strings(expected if tree else {"z": 0, **expected})


def test_options_of_callbacks_follow_their_callbacks(capsys):
    callbacks = ["--trainer.callbacks+=dtpvit.tasks.loss_watch.LossWatch", "--trainer.callbacks.init_args.stop=true"]
    callbacks += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.init_args.monitor=train/loss"]
    deep = ["--model.init_args.model.vision.dim=64", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(QUICKSTART), *callbacks, *deep])
    printed = yaml.safe_load(capsys.readouterr().out)
    found = [callback["init_args"] for callback in printed["trainer"]["callbacks"]]
    assert found[1] == {"stop": True} and found[2]["monitor"] == "train/loss"
    whole = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]["model"]["vision"]
    assert printed["model"]["init_args"]["model"]["vision"] == whole | {"dim": 64}


def test_the_quickstart_with_another_width_is_the_quickstart_else(capsys):
    whole = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]["model"]
    deep = ["--model.init_args.model.vision.dim", "64", "--print_config", "--model.model.vision.reducers={}"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(QUICKSTART), *deep])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["model"]
    assert printed == whole | {"vision": whole["vision"] | {"dim": 64, "reducers": {}}}
