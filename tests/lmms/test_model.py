"""The model as lmms-eval itself finds, makes and runs it."""

from importlib import import_module

import pytest
from colour_assistant import COLOURS, NAME, plain

from dtpvit.lmms.models import AVAILABLE_MODELS, manifest

lmms = pytest.importorskip("lmms_eval.api.model", reason="needs lmms-eval").lmms


@pytest.fixture(scope="module")
def model(colour_assistant):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    options = {"batch_size": "2", "max_batch_size": None, "device": "cpu"}
    return registry.get_model_class("dtpvit").create_from_arg_string(f"checkpoint={colour_assistant}", options)


def requests(documents, options):
    from lmms_eval.api.instance import Instance

    return [
        Instance(
            request_type="generate_until",
            arguments=(NAME, options, lambda document: [document["image"]], number, "colours", "test"),
            idx=0,
            metadata={"task": "colours", "doc_id": number, "repeats": 1},
        )
        for number in range(len(documents))
    ]


def test_versions_without_entry_points_find_the_class_by_its_name():
    for name, class_name in AVAILABLE_MODELS.items():
        assert issubclass(getattr(import_module(f"dtpvit.lmms.models.{name}"), class_name), lmms)


def test_requests_are_answered(model):
    documents = [{"image": plain(colour)} for colour in COLOURS]
    model.task_dict["colours"] = {"test": documents}
    assert model.generate_until(requests(documents, {"max_new_tokens": 8, "until": ["\n"]})) == [*COLOURS]


def test_likelihoods_and_several_rounds_are_declined_in_a_sentence(model):
    with pytest.raises(NotImplementedError, match="gives no likelihoods; take a task of generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round; take a task of generate_until"):
        model.generate_until_multi_round([])
