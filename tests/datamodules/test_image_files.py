"""The loader of image files, and shards of labelled images: order, ranks, repeats, broken images, exact resume."""

import io
import itertools
import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_files import make_shards, make_tree, noisy_jpeg, who
from shard_files import write_tar

from dtpvit.datamodules.augment import Augmentation
from dtpvit.datamodules.image_files import ImageFileLoader
from dtpvit.datamodules.labelled_index import index_labelled
from dtpvit.datamodules.labelled_recipe import LabelledImage
from dtpvit.datamodules.loader import ResumableLoader
from dtpvit.errors import UserError

DEIT = {"auto_augment": "rand-m9-mstd0.5-inc1"}


def make(data, *, classes=3, augment=None, **options):
    options = {"batch_size": 4} | options
    recipe = LabelledImage(Augmentation(16, **(augment or {})), classes, options.get("seed", 0))
    if list(Path(data).glob("*.tar")):
        return ResumableLoader(sorted(map(str, Path(data).glob("*.tar"))), recipe, shuffle_buffer=8, **options)
    return ImageFileLoader(index_labelled(data).samples, recipe, **options)


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"image", "label", "seed", "key"} and a["key"] == b["key"]
        assert all(torch.equal(a[name], b[name]) for name in a if name != "key")
    return True


def by_seed(batches):
    return {int(seed): image for b in batches for seed, image in zip(b["seed"], b["image"], strict=True)}


# ------------------------------------------------------------------ order


def test_an_epoch_gives_every_image_once_with_its_label_shuffled(tmp_path):
    loader = make(make_tree(tmp_path, 8), batch_size=5)
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 4 and loader.skipped == {}
        labels = [label for batch in batches for label in batch["label"].tolist()]
        orders.append(who(batches))
        assert len(set(orders[-1])) == 20 and [number // 8 for number in orders[-1]] == labels
        assert batches[0]["image"].shape == (5, 3, 16, 16) and batches[0]["image"].dtype == torch.uint8
        assert batches[0]["label"].dtype == batches[0]["seed"].dtype == torch.int64
    assert orders[0] == orders[2] != orders[1] and set(orders[0]) != set(orders[1])
    assert who(make(str(tmp_path), batch_size=5, seed=1)) != orders[0]
    fixed = make(str(tmp_path), batch_size=5, fixed=True)
    fixed.set_epoch(3)
    assert who(fixed) == orders[0]


@pytest.mark.parametrize("kind", ["folders", "shards"])
@pytest.mark.parametrize("per_class", [8, 9])
def test_ranks_are_disjoint_and_equally_long(tmp_path, kind, per_class):
    data = make_tree(tmp_path / "tree", per_class)
    if kind == "shards":
        data = make_shards(tmp_path / "shards", data, per_shard=per_class)
    parts = [list(make(data, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [3, 3]
    assert {len(batch["label"]) for part in parts for batch in part} == {4}
    if kind == "folders":
        assert len({*who(parts[0]), *who(parts[1])}) == 24
    else:
        assert not set(by_seed(parts[0])) & set(by_seed(parts[1]))


def test_a_step_sees_the_same_images_however_many_ranks_share_it(tmp_path):
    data = make_tree(tmp_path, 8, make=noisy_jpeg)
    whole = list(make(data, batch_size=8, augment=DEIT))
    halves = [list(make(data, batch_size=4, rank=rank, world_size=2, augment=DEIT)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        apart = by_seed([halves[0][step], halves[1][step]])
        together = by_seed([batch])
        assert apart.keys() == together.keys()
        assert all(torch.equal(apart[seed], together[seed]) for seed in together)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_repeated_augmentation_deals_copies_in_a_row_to_the_ranks_as_timm_does(tmp_path, world_size):
    data, size = make_tree(tmp_path, 16), 8 // world_size
    parts = [
        list(make(data, batch_size=size, repeats=3, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {6}
    dealt = list(itertools.chain(*zip(*(who(part) for part in parts), strict=True)))
    assert len(dealt) == 48 and len(set(dealt)) == 16
    assert [len(list(run)) for _, run in itertools.groupby(dealt)] == [3] * 16
    assert len({seed for part in parts for seed in by_seed(part)}) == 48


def test_copies_of_an_image_are_augmented_differently(tmp_path):
    (batch,) = make(make_tree(tmp_path, 1, make=noisy_jpeg), batch_size=3, repeats=3, augment=DEIT)
    assert len(set(batch["label"].tolist())) == 1
    assert len({image.numpy().tobytes() for image in batch["image"]}) == 3


# ------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_pixels_are_a_function_of_image_epoch_and_seed_alone(tmp_path, kind):
    data = make_tree(tmp_path / "tree", 4, make=noisy_jpeg)
    if kind == "shards":
        data = make_shards(tmp_path / "shards", data, per_shard=6)  # every worker's share is two whole batches

    def pixels(epoch, **options):
        loader = make(data, batch_size=3, augment=DEIT, **options)
        loader.set_epoch(epoch)
        return by_seed(loader)

    first, again, later, other = pixels(0), pixels(0, num_workers=2), pixels(1), pixels(0, seed=1)
    assert len(first) == 12 and first.keys() == again.keys()
    assert all(torch.equal(first[seed], again[seed]) for seed in first)
    for unlike in (later, other):
        assert not first.keys() & unlike.keys()
        assert len({image.numpy().tobytes() for image in [*first.values(), *unlike.values()]}) > 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_not_touched(tmp_path, num_workers):
    data = make_tree(tmp_path, 4, make=noisy_jpeg)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert len(list(make(data, num_workers=num_workers, augment=DEIT))) == 3
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


# ------------------------------------------------------------------ what is broken


def test_a_broken_image_is_replaced_by_another_the_same_one_each_time_and_counted(tmp_path):
    data = make_tree(tmp_path, 8, broken=(3, 12))
    (tmp_path / "cat" / "0020.jpg").unlink()
    (tmp_path / "cat" / "0020.jpg").symlink_to(tmp_path / "gone")
    loader = make(data)
    expected = list(loader)
    assert len(expected) == 6 and all(len(batch["label"]) == 4 for batch in expected)
    numbers = who(expected)
    assert not {3, 12, 20} & set(numbers) and len(set(numbers)) == 21
    assert [number // 8 for number in numbers] == [label for b in expected for label in b["label"].tolist()]
    assert loader.skipped["broken image"] >= 2 and loader.skipped["unreadable file"] >= 1
    counted = dict(loader.skipped)
    parallel = make(data, num_workers=2)
    for _ in range(2):
        assert same(parallel, expected) and parallel.skipped == counted
        parallel.set_epoch(0)
    parts = [batch for rank in (0, 1) for batch in make(data, batch_size=2, rank=rank, world_size=2)]
    assert Counter(who(parts)) == Counter(numbers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_without_a_usable_image_end_the_run_with_a_sentence(tmp_path, num_workers):
    data = make_tree(tmp_path, 4, broken=tuple(range(12)))
    with pytest.raises(UserError, match=r"Neither .*\.jpg nor any of 99 images .*broken image: \d+") as error:
        list(make(data, num_workers=num_workers))
    assert "\n" not in str(error.value)


def test_samples_of_shards_without_image_or_label_are_counted(tmp_path):
    good = {f"g{i}": {"jpg": noisy_jpeg(i), "cls": b"1"} for i in range(4)}
    odd = {"a": {"jpg": noisy_jpeg(9)}, "b": {"cls": b"1"}, "c": {"jpg": b"x", "cls": b"2\n"}}
    write_tar(tmp_path / "0.tar", good | odd)
    loader = make(str(tmp_path), num_samples=4)
    (batch,) = loader
    assert batch["label"].tolist() == [1] * 4
    assert set(loader.skipped) <= {"no label", "no image", "broken image"} and loader.skipped["no label"] >= 1


@pytest.mark.parametrize(
    ("label", "sentence"),
    [(b"3", "has the label 3 where 3 classes allow 0 to 2"), (b"-1", "label -1"), (b"cat", "cls holds b'cat'")],
)
def test_a_label_that_is_no_class_ends_the_run_with_a_sentence(tmp_path, label, sentence):
    write_tar(tmp_path / "0.tar", {f"g{i}": {"jpg": noisy_jpeg(i), "cls": label} for i in range(4)})
    with pytest.raises(UserError, match=sentence) as error:
        list(make(str(tmp_path), num_workers=2))
    assert "\n" not in str(error.value)


def test_too_few_images_for_a_batch_are_refused(tmp_path):
    with pytest.raises(UserError, match="The 3 training samples do not fill one batch of 2 on 2 rank"):
        make(make_tree(tmp_path, 1), batch_size=2, world_size=2)


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_resume_continues_with_the_very_next_batch(tmp_path, kind, num_workers):
    data = make_tree(tmp_path / "tree", 10, make=noisy_jpeg, broken=(3, 12, 13))
    if kind == "shards":
        data = make_shards(tmp_path / "shards", data)
    options = {"num_workers": num_workers, "augment": DEIT}
    if kind == "folders":
        options["repeats"] = 2
    loader = make(data, **options)
    loader.set_epoch(2)
    whole = list(loader)
    assert len(whole) == 7
    for position in (1, 4):
        loader.set_epoch(0)
        loader.set_epoch(2)
        for _ in itertools.islice(loader, position):
            pass
        stream = io.BytesIO()
        torch.save(loader.state_dict(), stream)
        stream.seek(0)
        resumed = make(data, **options)
        resumed.load_state_dict(torch.load(stream, weights_only=True))
        resumed.set_epoch(2)  # as Lightning does, after iter
        assert same(resumed, whole[position:])
    resumed.set_epoch(3)
    loader.set_epoch(3)
    assert same(resumed, loader)


def test_files_resume_exactly_with_another_number_of_workers(tmp_path):
    data = make_tree(tmp_path, 8, make=noisy_jpeg, broken=(3,))
    loader = make(data, num_workers=2, augment=DEIT)
    whole = list(loader)
    next(iter(loader))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = make(data, augment=DEIT)
        resumed.load_state_dict(loader.state_dict())
    assert same(resumed, whole[1:])
    assert resumed.state_dict()["position"] == 6
    after = make(data, augment=DEIT)
    after.load_state_dict(resumed.state_dict())
    loader.set_epoch(1)
    assert same(after, loader)


def test_another_layout_resumes_with_as_many_batches_and_a_warning(tmp_path):
    data = make_tree(tmp_path, 8)
    loader = make(data, batch_size=4)
    next(iter(loader))
    resumed = make(data, batch_size=3)
    with pytest.warns(UserWarning, match="another batch_size than the checkpoint's"):
        resumed.load_state_dict(loader.state_dict())
    rest = who(resumed)
    assert len(rest) == 3 * 7 and rest != who(make(data, batch_size=3))[3:]
    assert len(set(rest)) == 21
