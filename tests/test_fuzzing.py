"""The fast share of ``python -m benchmarks.fuzz``: a few thousand spoilt files, through every reader.

Whatever a reader raises that is not a refusal of ours fails here; so does what takes long, for the whole is timed.
"""

import json
import logging
import multiprocessing
import os
import random
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from benchmarks.fuzz_targets import TARGETS
from dtpvit.cli import main
from dtpvit.datamodules.tars import BrokenTar, index_members, read_members
from dtpvit.errors import UserError
from dtpvit.interop.weight_files import read_checkpoint
from dtpvit.json_input import parse_json

QUICK = [target for target in TARGETS if target.name != "config"]
EXAMPLES = 200


@pytest.fixture
def quiet():
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_spoilt_files_are_used_or_refused(target, tmp_path, quiet, capfd):
    seeds, found = target.seeds(), set()

    @settings(
        max_examples=EXAMPLES if "zip" not in target.name else EXAMPLES // 4,
        deadline=None,
        derandomize=True,
        database=None,
    )
    @given(number=st.integers(0, 1 << 60))
    def read(number):
        found.add(target.read(target.mutate(seeds, random.Random(number)), tmp_path))

    read()
    assert "accepted" in found and len(found) > 1, "neither all whole nor all ruined, or this says nothing"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=JSON)
def test_json_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert json.dumps(parse_json(text)) == json.dumps(parse_json(text.encode())) == text


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000, "9" * 9000, b"\xef\xbb\xbf{"])
def test_json_that_is_none_has_one_error(text):
    with pytest.raises(json.JSONDecodeError):
        parse_json(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=2000))
def test_any_bytes_are_an_archive_or_a_broken_one(tmp_path, data):
    for name in ("x.tar", "x.tar.gz"):
        (tmp_path / name).write_bytes(data)
        for read in (read_members, index_members):
            try:
                list(read(str(tmp_path / name)))
            except BrokenTar:
                pass


def test_a_fault_is_found_and_named(capsys):
    """Or a run without faults would say nothing: one that raises, one that never ends, one that ends the process."""

    def read(data, folder):
        number = int(data)
        if number == 1:
            raise KeyError("what nobody expected")
        while number == 3:
            pass
        if number == 5:
            os._exit(9)
        return "accepted" if number % 2 else "even"

    place = multiprocessing.get_context("fork").Value("i", -1)  # shared: the third process goes on at 6

    def count(seeds, random):
        place.value += 1
        return b"%d" % place.value

    target = fuzz.Target("faulty", 1, lambda: [b"0"], count, read)
    found = fuzz.fuzz(target, 0, 8, 0, 0.2)
    assert set(found.faults) == {1, 3, 5} and found.outcomes == {"accepted": 1, "even": 4, "fault": 3}
    assert "KeyError" in found.faults[1] and "Hang" in found.faults[3] and "ended with 9" in found.faults[5]


def test_an_input_is_a_function_of_its_number():
    for target in TARGETS:
        seeds = target.seeds()
        one, same, other = (target.mutate(seeds, random.Random(f"0 {target.name} {number}")) for number in (3, 3, 4))
        assert one == same != other, target.name


# ------------------------------------------------------------------ what fuzzing found


def test_a_compressed_checkpoint_is_no_checkpoint(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as whole, zipfile.ZipFile(tmp_path / "b.ckpt", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert read_checkpoint(tmp_path / "a.ckpt")["a"].shape == (1 << 20,)
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"model: \x8c", "is no text in UTF-8; give a YAML file"),
        (b"model: " + b"[" * 300 + b"]" * 300, "is nested more than 50 deep"),
        (b"seed_everything: " + b"9" * 5000, "holds a value that is none"),
        (b"seed_everything: 2026-99-99", "holds a value that is none"),
    ],
)
def test_configs_that_are_none_are_refused_in_a_sentence(tmp_path, capsys, text, sentence):
    (tmp_path / "config.yaml").write_bytes(text)
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
