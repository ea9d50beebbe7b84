"""The data module for classifiers: what it refuses before work starts, and what a run gets from it."""

import logging
import shutil
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from labelled_files import CLASSES, make_shards, make_tree, noisy_jpeg, plain_png, who
from lightning.pytorch.callbacks import ModelCheckpoint
from shard_files import write_tar
from timm.data import ImageNetInfo
from torch import nn

from dtpvit.datamodules.labelled_images import LabelledImages
from dtpvit.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
no_validation = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero:UserWarning")


class Model(L.LightningModule):
    """Exposes what the data module asks a task for, and keeps the batches."""

    def __init__(self, num_classes=3, image_size=(16, 12)):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.image_size, self.num_classes = image_size, num_classes
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch)
        return (self.weight - batch["image"].float().mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "max_epochs": 1}
    return L.Trainer(**(quiet | options))


def module(**options):
    return LabelledImages(**({"batch_size": 4, "num_workers": 0, "image_size": 8, "num_classes": 3} | options))


def sentence_of(data, stage="fit"):
    with pytest.raises(UserError) as error:
        data.setup(stage)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys()
        and a.get("key") == b.get("key")
        and all(torch.equal(a[name], b[name]) for name in a if name != "key")
        for a, b in zip(first, second, strict=True)
    )


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("kind", ["folders", "shards"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_trains_and_validates_and_resumes_exactly_in_mid_epoch(tmp_path, kind, num_workers):
    train = make_tree(tmp_path / "train", 7, make=noisy_jpeg, broken=(2, 9))
    val = make_tree(tmp_path / "val", 3)
    if kind == "shards":
        train, val = make_shards(tmp_path / "a", train), make_shards(tmp_path / "b", val)
    options = {"train": train, "val": val, "batch_size": 4, "val_batch_size": 5, "num_workers": num_workers}
    every = ModelCheckpoint(dirpath=tmp_path / "runs", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, data = Model(), LabelledImages(**options)
    trainer(max_epochs=2, callbacks=[every], enable_checkpointing=True).fit(whole, data)
    assert data.classnames == CLASSES and len(whole.trained) == 10
    for batch in whole.trained:
        assert batch["image"].shape == (4, 3, 16, 12) and batch["image"].dtype == torch.uint8
        assert batch["label"].shape == batch["seed"].shape == (4,)
        assert batch["label"].dtype == batch["seed"].dtype == torch.int64
    assert all(set(batch) == {"image", "label"} for batch in whole.validated)
    assert torch.cat([batch["label"] for batch in whole.validated]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    for step in (2, 5, 8):
        resumed = Model()
        trainer(max_epochs=2).fit(resumed, LabelledImages(**options), ckpt_path=tmp_path / "runs" / f"step={step}.ckpt")
        assert same(resumed.trained, whole.trained[step:]), step
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_unaugmented_training_images_are_validations_in_every_epoch(tmp_path, kind):
    root = tree = make_tree(tmp_path / "tree", 4, make=lambda number: noisy_jpeg(number, (30 + number, 44 - number)))
    if kind == "shards":
        root = make_shards(tmp_path / "shards", tree)
    data = module(train=root, val=root, image_size=(16, 24), crop_pct=0.8, interpolation="bilinear", augment=False)
    assert not data.augments and module().augments
    data.setup("fit")
    expected = {image.numpy().tobytes() for batch in data.val_dataloader() for image in batch["image"]}
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        found = [image.numpy().tobytes() for batch in loader for image in batch["image"]]
        assert len(found) == len(expected) == 12 and set(found) == expected


@no_validation
@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_overfitting_shows_the_same_batches_again(tmp_path, kind):
    train = make_tree(tmp_path / "train", 8, make=noisy_jpeg)
    if kind == "shards":
        train = make_shards(tmp_path / "shards", train)
    model = Model()
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer(max_epochs=3, overfit_batches=2).fit(model, module(train=train))
    assert same(model.trained[:2], model.trained[2:4]) and same(model.trained[:2], model.trained[4:])
    assert not torch.equal(model.trained[0]["seed"], model.trained[1]["seed"])


@no_validation
def test_a_run_without_validation_says_so(tmp_path, caplog):
    model = Model()
    with caplog.at_level(logging.WARNING):
        trainer().fit(model, module(train=make_tree(tmp_path), image_size=None))
    assert "no validation: val is not set" in caplog.text and len(model.trained) == 6


def test_evaluation_alone_needs_no_training_data(tmp_path):
    model = Model(image_size=8)
    data = LabelledImages(val=make_tree(tmp_path), train=str(tmp_path / "gone"), num_workers=0)
    trainer().validate(model, data, verbose=False)
    assert who(model.validated) == list(range(24)) and data.classnames == CLASSES


def test_folders_and_shards_of_the_same_images_validate_alike(tmp_path):
    tree = make_tree(tmp_path / "tree", 5, make=lambda number: noisy_jpeg(number, (30 + number, 44 - number)))
    batches = []
    for val in (tree, make_shards(tmp_path / "shards", tree, per_shard=4)):
        data = module(val=val, image_size=(16, 24), crop_pct=0.8, interpolation="bilinear")
        data.setup("validate")
        batches.append(list(data.val_dataloader()))
    assert same(*batches) and [len(batch["label"]) for batch in batches[0]] == [4, 4, 4, 3]


def test_a_flat_folder_of_imagenet_files_trains_and_has_imagenets_names(tmp_path):
    wnids = ImageNetInfo().label_names()
    for label in (0, 5, 999, 7):
        (tmp_path / f"{wnids[label]}_{label}.JPEG").write_bytes(plain_png(label % 200))
    data = module(train=str(tmp_path), val=str(tmp_path), num_classes=1000, auto_augment=None)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["label"].tolist()) == [0, 5, 7, 999]
    assert [label % 200 for label in batch["label"].tolist()] == who([batch])
    assert len(data.classnames) == 1000 and data.classnames[0] == "tench"


def test_a_limit_keeps_as_many_of_each_class_and_more_keep_the_same(tmp_path):
    root = Path(make_tree(tmp_path, 8))
    for number in (1, 2, 3, 4, 5, 6, 7):
        (root / "ant" / f"{number:04d}.jpg").unlink()  # one is left
    kept = {}
    for limit in (3, 6, 12, 17, 99):
        data = module(train=str(tmp_path), batch_size=1, limit_train=limit, auto_augment=None)
        data.setup("fit")
        kept[limit] = set(who(data.train_dataloader()))
    counts = {limit: sorted(Counter(number // 8 for number in numbers).items()) for limit, numbers in kept.items()}
    assert counts[3] == [(0, 1), (1, 1), (2, 1)] and counts[6] == [(0, 1), (1, 3), (2, 2)]
    assert len(kept[12]) == 12 and len(kept[17]) == len(kept[99]) == 17
    assert kept[3] < kept[6] < kept[12] < kept[17]
    assert "keep at least one image of each" in sentence_of(module(train=str(tmp_path), limit_train=2))


def test_shards_without_their_number_of_samples_are_counted(tmp_path):
    tree = make_tree(tmp_path / "tree", 8)
    bare = make_shards(tmp_path / "shards", tree, names=False, stats=False)
    data = module(train=bare, val=tree)
    data.setup("fit")
    assert len(data.train_dataloader()) == 6 and data.classnames == CLASSES
    fewer = module(train=bare, num_samples=8)
    fewer.setup("fit")
    assert len(fewer.train_dataloader()) == 2 and fewer.classnames is None


# ------------------------------------------------------------------ refusals


def test_a_folder_of_splits_is_refused(tmp_path):
    make_tree(tmp_path / "train"), make_tree(tmp_path / "val")
    found = sentence_of(module(train=str(tmp_path)))
    assert f"{tmp_path} holds the splits train, val where class folders were expected" in found
    assert found.endswith(f"give one split, such as {tmp_path / 'train'}.")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"train": None}, "no training images; set train"),
        ({"train": "gone", "get_data": "see data/README.md"}, "gone is no folder on this machine"),
        ({"train": "empty"}, "empty holds no class folders"),
        ({"val": "empty"}, "empty holds no class folders"),
        ({"num_classes": 5}, "tree has 3 classes (ant to cat) where the model's head has 5: set num_classes to 3"),
        ({"train": "shards", "num_classes": 5}, "shards has 3 classes (ant to cat) where the model's head has 5"),
        ({"val": "two"}, "two has 2 classes where tree has 3, without 'bee': give"),
        ({"val": "other"}, "other has 3 classes where tree has 3, without 'bee', and with 'owl'"),
        ({"val": "reordered"}, "Label 0 is 'ant' in tree and 'cat' in reordered"),
        ({"train": "bare", "val": "two", "num_classes": 2}, "00001.tar has the label 2 where 2 classes allow 0 to 1"),
        ({"train": "bare", "num_classes": None}, "The data module has no num_classes and no model"),
        ({"train": "unlabelled"}, "no sample with both an image"),
        ({"train": "nested"}, "nested holds no training shards, only those in nested/test"),
        ({"train": "shards", "limit_train": 6}, "limit_train is 6, but shards is shards"),
        ({"train": "shards", "repeats": 3}, "repeats is 3, but shards is shards"),
        ({"train": "shards", "labels": "v2"}, "labels is 'v2', but training shards"),
        ({"num_samples": 6}, "num_samples is 6, but tree is a folder of images"),
        ({"image_size": None}, "no image_size and no model"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_any_work(tmp_path, monkeypatch, options, found):
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path / "tree")
    make_tree(tmp_path / "two", classes=["ant", "cat"])
    make_tree(tmp_path / "other", classes=["ant", "cat", "owl"])
    make_shards(tmp_path / "shards", "tree")
    make_shards(tmp_path / "bare", "tree", names=False, stats=False)
    shutil.copytree("shards", "reordered")
    Path("reordered/classnames.txt").write_text("cat\nbee\nant\n")
    write_tar(tmp_path / "unlabelled" / "0.tar", {"a": {"jpg": noisy_jpeg(0)}})
    make_shards(tmp_path / "nested" / "test", "tree")
    (tmp_path / "empty").mkdir()
    sentence = sentence_of(module(**({"train": "tree", "val": None} | options)))
    assert found in sentence and sentence.count(". ") == 0
    assert ("(see data/README.md)." in sentence) == ("get_data" in options)


def test_the_models_own_head_is_asked_and_compared(tmp_path):
    tree = make_tree(tmp_path)
    with pytest.raises(UserError, match=r"3 classes .* where the model's head has 7"):
        trainer().fit(Model(7), LabelledImages(train=tree, num_workers=0))
    with pytest.raises(UserError, match="num_classes of the data is 3 where the model's head has 7"):
        trainer().fit(Model(7), LabelledImages(train=tree, num_workers=0, num_classes=3))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"val_batch_size": 0}, "batch size is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"auto_augment": "best"}, "no augmentation"),
        ({"crop_pct": 2}, "crop_pct is 2"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'"),
        ({"train_interpolation": "cubic"}, "interpolation is 'cubic'"),
    ],
)
def test_impossible_settings_are_refused_at_once(options, found):
    with pytest.raises(UserError, match=found):
        module(**options)


def test_nothing_to_evaluate_on_is_said(tmp_path):
    assert "nothing to evaluate on" in sentence_of(module(train=str(tmp_path)), "validate")


# ------------------------------------------------------------------ real images


def test_flowers_train_and_validate(shared_data):
    root = shared_data / "classify" / "flowers224"
    data = LabelledImages(
        train=str(root / "train"), val=str(root / "test"), batch_size=50, num_workers=2, image_size=64, num_classes=5,
        limit_train=250, repeats=3,
    )  # fmt: skip
    data.setup("fit")
    assert data.classnames == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == 5 and loader.skipped == {}
    assert len(torch.cat([batch["label"] for batch in batches]).unique()) == 5
    assert 60 < torch.cat([batch["image"] for batch in batches]).float().mean() < 160
    found = torch.cat([batch["label"] for batch in data.val_dataloader()])
    assert len(found) == 375 and found.tolist() == sorted(found.tolist())
