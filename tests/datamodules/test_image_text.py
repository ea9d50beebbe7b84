"""The data module: what it finds before work starts, and what its loaders give under a trainer."""

import lightning as L
import pytest
import torch
from shard_files import jpeg, shared, tokenize, write_shards, write_tar
from torch import nn

from dtpvit.datamodules.image_text import ImageTextShards
from dtpvit.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
no_validation = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero:UserWarning")


class Model(L.LightningModule):
    """Exposes what the data module asks a task for, and keeps the batches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.image_size = (16, 12)
        self.tokenize = tokenize
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch)
        return self.weight.square()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((dataloader_idx, batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "max_epochs": 1}
    return L.Trainer(**(quiet | options))


def labelled(folder, count=6):
    samples = {f"s{i}": {"jpg": jpeg(i), "cls": str(i % 3).encode()} for i in range(count)}
    write_tar(folder / "0.tar", samples, stats=False)
    (folder / "classnames.txt").write_text("ant\nbee\ncat\n")
    return str(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_trains_and_validates_on_all_three_kinds(tmp_path, num_workers):
    write_shards(tmp_path / "train", [9, 9])
    write_shards(tmp_path / "val", [7])
    data = ImageTextShards(
        train=str(tmp_path / "train"),
        val=str(tmp_path / "val"),
        zeroshot=labelled(tmp_path / "zeroshot"),
        zeroshot_templates="simple",
        batch_size=4,
        val_batch_size=5,
        num_workers=num_workers,
    )
    model = Model()
    trainer(max_epochs=2).fit(model, data)
    assert len(model.trained) == 8
    for batch in model.trained:
        assert batch["image"].shape == (4, 3, 16, 12) and batch["image"].dtype == torch.uint8
        assert batch["text"].shape == (4, 4) and batch["text"].dtype == torch.int64
        assert batch["seed"].shape == (4,) and batch["seed"].dtype == torch.int64
    pairs = [batch for index, batch in model.validated if index == 0]
    images = [batch for index, batch in model.validated if index == 1]
    assert sorted(number for b in pairs for number in b["text"][:, 0].tolist()) == sorted([*range(7)] * 2)
    assert sorted(label for b in images for label in b["label"].tolist()) == sorted([0, 0, 1, 1, 2, 2] * 2)
    assert all(set(batch) == {"image", "label"} for batch in images)
    names, templates = data.zeroshot_prompts
    assert names == ["ant", "bee", "cat"] and len(templates) == 7 and "ant" in templates[0]("ant")


def test_validation_is_the_same_in_every_epoch(tmp_path):
    meta = b'{"captions": ["caption 1", "caption 2", "caption 3"]}'
    parts = {f"{i}": {"jpg": jpeg(i), "txt": b"caption 9", "json": meta} for i in range(8)}
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", parts)
    data = ImageTextShards(train=str(tmp_path / "train"), val=str(tmp_path / "val"), batch_size=8, num_workers=0)
    model = Model()
    trainer(max_epochs=3).fit(model, data)
    captions = [batch["text"][:, 0].tolist() for batch in model.trained]
    assert all(set(row) <= {1, 2, 3} for row in captions) and len({tuple(row) for row in captions}) == 3
    first, *others = [batch for _, batch in model.validated]
    assert first["text"][:, 0].tolist() == [9] * 8
    for other in others:
        assert first.keys() == other.keys() and first["key"] == other["key"]
        assert all(torch.equal(first[name], other[name]) for name in first if name != "key")


@no_validation
def test_overfitting_shows_the_same_batches_again(tmp_path):
    write_shards(tmp_path, [24])
    model = Model()
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer(max_epochs=3, overfit_batches=2).fit(
            model, ImageTextShards(train=str(tmp_path), batch_size=4, num_workers=0)
        )
    seeds = [batch["seed"].tolist() for batch in model.trained]
    assert len(seeds) == 6 and seeds[:2] == seeds[2:4] == seeds[4:] and seeds[0] != seeds[1]


@no_validation
def test_a_part_of_an_epoch_is_another_part_each_time(tmp_path):
    write_shards(tmp_path, [24])
    model = Model()
    trainer(max_epochs=2, limit_train_batches=2).fit(
        model, ImageTextShards(train=str(tmp_path), batch_size=4, num_workers=0)
    )
    seeds = [batch["seed"].tolist() for batch in model.trained]
    assert len(seeds) == 4 and len({tuple(row) for row in seeds}) == 4


def test_evaluation_alone_needs_no_training_data(tmp_path):
    write_shards(tmp_path, [5])
    data = ImageTextShards(val=str(tmp_path), num_workers=0)
    model = Model()
    trainer().validate(model, data, verbose=False)
    assert len(model.validated) == 1 and data.zeroshot_prompts is None
    with pytest.raises(UserError, match="no training shards"):
        data.setup("fit")


def test_without_a_trainer_size_and_tokenizer_must_be_given(tmp_path):
    write_shards(tmp_path, [5])
    data = ImageTextShards(train=str(tmp_path), batch_size=5, num_workers=0)
    with pytest.raises(UserError, match="no image_size and no model"):
        data.setup("fit")
    data = ImageTextShards(train=str(tmp_path), batch_size=5, num_workers=0, image_size=8, tokenize=tokenize)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train": "{0}/gone"}, r"gone does not exist.*\(see data/cc12m/README.md\)\.$"),
        (
            {"train": "{0}/train", "val": "{0}/gone/*.tar"},
            r"No shards are at .*\(see data/cc12m/README.md\)\.$",
        ),
        ({"train": "{0}/train", "zeroshot": "{0}/gone"}, "gone"),
        (
            {"train": "{0}/train", "zeroshot": "{0}/zeroshot", "zeroshot_templates": "{0}/gone.txt"},
            "gone.txt",
        ),
        ({"train": None}, "no training shards"),
    ],
)
def test_missing_data_are_said_before_any_work(tmp_path, options, sentence):
    write_shards(tmp_path / "train", [5])
    labelled(tmp_path / "zeroshot")
    filled = {name: value and value.format(tmp_path) for name, value in options.items()}
    data = ImageTextShards(**filled, get_data="see data/cc12m/README.md", image_size=8, tokenize=tokenize)
    with pytest.raises(UserError, match=sentence) as error:
        data.setup("fit")
    assert "\n" not in str(error.value)


def test_nothing_to_evaluate_on_is_said(tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        ImageTextShards(train=str(tmp_path), image_size=8, tokenize=tokenize).setup("validate")
    with pytest.raises(UserError, match="batch sizes are 0"):
        ImageTextShards(train=str(tmp_path), batch_size=0)


def test_real_captions_end_to_end():
    open_clip = pytest.importorskip("open_clip")
    folder = shared("captions/flickr8k_ar256")
    data = ImageTextShards(
        train=str(folder),
        val=str(folder),
        batch_size=50,
        num_workers=2,
        image_size=32,
        tokenize=open_clip.get_tokenizer("ViT-B-32"),
    )
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == 20 and loader.skipped == {}
    assert len({seed for batch in batches for seed in batch["seed"].tolist()}) == 1000
    assert all(batch["text"].shape == (50, 77) for batch in batches)
    assert 60 < torch.cat([batch["image"] for batch in batches]).float().mean() < 160
    (val,) = data.val_dataloader()
    assert sum(len(batch["seed"]) for batch in val) == 1000
