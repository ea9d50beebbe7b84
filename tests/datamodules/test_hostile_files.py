"""Files made to take all memory or never to end: refused, each as cheaply as it can be."""

import gzip
import os
import tracemalloc

import pytest
from bad_images import BAD
from shard_files import jpeg, pair, write_tar

from dtpvit.datamodules.image_places import Place, read_place
from dtpvit.datamodules.labelled_images import LabelledImages
from dtpvit.datamodules.real_images import real_images
from dtpvit.datamodules.samples import SkippedSample, read_samples
from dtpvit.datamodules.shards import shard_counts
from dtpvit.datamodules.tars import MOST_BYTES, BrokenTar, index_members, read_members
from dtpvit.errors import UserError
from dtpvit.evaluation.vqa_questions import read_questions
from dtpvit.interop.preprocessing import eval_transform


def heaviest(act):
    """Peak of what Python held, in MiB."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1] >> 20
    finally:
        tracemalloc.stop()


def raw_header(name: bytes, size: bytes, kind=b"0") -> bytes:
    head = bytearray(512)
    head[: len(name)], head[124 : 124 + len(size)], head[156:157] = name, size, kind
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


SIZES = {
    "8 GiB": b"77777777777\0",
    "2 to the 80": b"\x80" + b"\xff" * 10 + b"\0",
    "less than nothing": b"-0000000017\0",
}


@pytest.mark.parametrize("kind", [b"0", b"x", b"L"], ids=["file", "pax", "long name"])
@pytest.mark.parametrize("size", SIZES)
def test_a_header_may_claim_any_size(tmp_path, size, kind):
    for name in ("x.tar", "x.tar.gz"):
        content = raw_header(b"a.jpg", SIZES[size], kind) + bytes(1 << 20)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)

        def read(name=name):
            with pytest.raises(BrokenTar, match=r"a member claims|damaged header"):
                list(read_members(str(tmp_path / name)))

        assert heaviest(read) < 20
    with pytest.raises(BrokenTar, match=r"a member claims|damaged header"):
        list(index_members(str(tmp_path / "x.tar")))


def test_pax_headers_cannot_claim_it_either(tmp_path):
    record = b"28 size=9999999999999999999\n"
    content = (
        raw_header(b"h", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0") + raw_header(b"a.jpg", b"0" * 11)
    )
    (tmp_path / "x.tar").write_bytes(content)
    for read in (read_members, index_members):
        with pytest.raises(BrokenTar, match="a member claims"):
            list(read(str(tmp_path / "x.tar")))
    nonsense = b"5 a=\n" * 200_000  # whoever copies the rest at each record takes minutes
    content = raw_header(b"h", b"%011o\0" % len(nonsense), b"x") + nonsense.ljust(-(-len(nonsense) // 512) * 512, b"\0")
    (tmp_path / "y.tar").write_bytes(content + raw_header(b"a.jpg", b"0" * 11) + bytes(1024))
    assert list(read_members(str(tmp_path / "y.tar"))) == [("a.jpg", b"")]


def test_compressed_bombs_are_refused(tmp_path):
    with gzip.open(tmp_path / "x.tar.gz", "wb", 9) as file:
        for number in range(40):  # 400 MB in 400 KB, of members that are each allowed
            file.write(raw_header(b"%d.jpg" % number, b"%011o\0" % (10 << 20)))
            file.write(bytes(10 << 20))
    found, causes = [], []
    for key, parts in read_samples(str(tmp_path / "x.tar.gz"), lambda cause, where: causes.append((cause, where))):
        found.append(key)
        del parts
    assert 0 < len(found) < 30 and len(causes) == 1 and "200 times as large as its compressed file" in causes[0][1]


def test_a_sample_of_many_members_is_bounded(tmp_path):
    part = bytes(MOST_BYTES // 4)
    write_tar(tmp_path / "x.tar", {"good": pair(0), "a": {str(number): part for number in range(5)}})
    causes = []
    found = read_samples(str(tmp_path / "x.tar"), lambda cause, where: causes.append(where))
    assert [key[-4:] for key, _ in found] == ["good"] and "the sample a is larger than 256 MiB" in causes[0]


def test_devices_and_pipes_are_no_images(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg", "gone.jpg", "a\0b"):
        with pytest.raises(SkippedSample, match="unreadable file"):
            read_place(Place(str(tmp_path / name)))
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", MOST_BYTES + 1)
    with pytest.raises(SkippedSample, match="oversized image"):
        read_place(Place(str(tmp_path / "huge.jpg")))


def test_a_folder_to_be_drawn_may_hold_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").write_bytes(jpeg(0))
    assert len(real_images(str(tmp_path), 2, eval_transform((8, 8)), least=1)[0]) == 1
    with pytest.raises(UserError, match=r"there is no image .*gone.jpg"):
        real_images(str(tmp_path / "gone.jpg"), 1, eval_transform((8, 8)))


def test_names_of_files_need_not_be_text(tmp_path):
    folder = tmp_path / "0"
    folder.mkdir()
    for number in range(3):
        with open(os.fsencode(folder) + b"/\xff%d.jpg" % number, "wb") as file:
            file.write(jpeg(number))
    data = LabelledImages(
        train=str(tmp_path), image_size=8, num_classes=1, labels="folders", batch_size=3, num_workers=0
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(set(batch["seed"].tolist())) == 3


def test_questions_and_sizes_nested_without_end_are_refused(tmp_path):
    for number, text in enumerate(["[" * 100_000, '{"a": ' * 100_000, "[" + "[" * 900 + "]" * 901, "9" * 9000]):
        (tmp_path / f"{number}.json").write_text(text)
        with pytest.raises(UserError):
            read_questions(str(tmp_path / f"{number}.json"))
    shard = write_tar(tmp_path / "0.tar", {"a": pair(0)})
    for text in ("[" * 100_000, '{"successes": 1e999}', '{"successes": %s}' % ("9" * 400), '{"successes": -1}'):
        (tmp_path / "0_stats.json").write_text(text)
        assert shard_counts([shard]) == [None]


def test_validation_leaves_out_what_training_does(tmp_path):
    files = [*(file for file, _ in BAD.values()), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", jpeg(0)]
    for number, file in enumerate(files):
        (tmp_path / "data" / f"{number:03d}").mkdir(parents=True)
        (tmp_path / "data" / f"{number:03d}" / "x.jpg").write_bytes(file)
    data = LabelledImages(
        val=str(tmp_path / "data"), image_size=8, num_classes=len(files), labels="folders", num_workers=0
    )
    data.setup("validate")
    loader = data.val_dataloader()
    (batch,) = loader
    assert batch["label"].tolist() == [len(files) - 1] and loader.skipped == len(files) - 1
