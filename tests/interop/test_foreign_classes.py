"""A file that came in a folder with the module that it names."""

import json
import sys

import pytest
import torch

from dtpvit.errors import UserError
from dtpvit.evaluation.run_model import nominal_gmacs
from dtpvit.evaluation.run_record import RunRecord
from dtpvit.interop.loading import load_clip

MODEL = {
    "embed_dim": 8,
    "vision": {"image_size": 16, "dim": 8, "depth": 2, "num_heads": 1, "patch_size": 8},
    "text": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A folder below the working folder, with a module that leaves a file where it is imported."""
    (tmp_path / "fetched_run" / "code").mkdir(parents=True)
    (tmp_path / "fetched_run" / "code" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "fetched_run"
    assert not (tmp_path / "ran").exists() and "fetched_run" not in sys.modules


def model(class_path):
    return MODEL | {"vision": MODEL["vision"] | {"reducers": {1: {"class_path": class_path}}}}


def test_a_checkpoint_imports_nothing_from_its_own_folder(fetched):
    named = {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": {"model": model("fetched_run.code.evil.Reducer")}}
    torch.save(named, fetched / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt names a class of fetched_run, the folder that it lies in"):
        load_clip(checkpoint=fetched / "last.ckpt")


@pytest.mark.parametrize("class_path", ["fetched_run.code.evil.Reducer", "fetched_run%2Ecode%2Eevil%2EReducer"])
def test_an_exported_folder_imports_nothing_from_itself(fetched, class_path):
    (fetched / "open_clip_config.json").write_text(json.dumps({"model_cfg": model(class_path)}))
    with pytest.raises(UserError, match="names a class of fetched_run"):
        load_clip(model=f"local-dir:{fetched}")


def test_a_report_imports_nothing_from_the_folder_of_a_run(fetched):
    config = {"model": {"init_args": {"model": model("fetched_run.code.evil.Reducer")}}}
    (fetched / "config.yaml").write_text(json.dumps(config))
    assert nominal_gmacs(RunRecord(fetched, config=config)) is None


def test_classes_of_ones_own_are_found(fetched):
    (fetched.parent / "own_classes.py").write_text("from dtpvit.encoder.reducers import FixedStride as Own")
    config = {"model": {"init_args": {"model": model("own_classes.Own"), "accum_freq": 1}}}
    config["model"]["init_args"]["model"]["vision"]["reducers"][1]["init_args"] = {"compression": 2}
    (fetched / "config.yaml").write_text(json.dumps(config))
    assert nominal_gmacs(RunRecord(fetched, config=config)) is not None
