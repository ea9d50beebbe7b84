"""Reading archives that nobody promised to be whole, and decoding what is in them."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from shard_files import jpeg, pair, shared, tokenize, write_tar

from dtpvit.datamodules import samples as samples_module
from dtpvit.datamodules.samples import (
    ImageText,
    SkippedSample,
    decode_image,
    decode_pixels,
    read_samples,
    sample_seed,
)
from dtpvit.datamodules.tars import BrokenTar, index_members, read_members
from dtpvit.datamodules.transforms import train_transform
from dtpvit.interop.preprocessing import eval_transform

LONG = "a/very/long/path/" * 14


def by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]


def collect(shard):
    causes = []
    return list(read_samples(str(shard), lambda cause, where: causes.append(cause))), causes


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "sub/folder/", "ü/" * 20, LONG], ids=["", "sub", "unicode", "long"])
def test_archives_are_read_as_tarfile_reads_them(tmp_path, form, folder):
    if form == tarfile.USTAR_FORMAT and folder == LONG:
        folder = "a/long/path/" * 16  # ustar's own limit is 255 letters
    path = tmp_path / "x.tar"
    samples = {f"{folder}{i}": {"jpg": jpeg(i), "txt": b"", "bin": bytes(i * 171)} for i in range(7)}
    write_tar(path, samples, format=form)
    with tarfile.open(path, "a", format=form) as tar:
        tar.addfile(_link("link", "0.jpg"))
    expected = by_tarfile(path)
    assert len(expected) == 21 and list(read_members(str(path))) == expected


def _link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_compressed_archives_and_commands(tmp_path):
    plain = write_tar(tmp_path / "x.tar", {"0": pair(0)})
    zipped = write_tar(tmp_path / "x.tar.gz", {"0": pair(0)}, mode="w:gz")
    assert list(read_members(zipped)) == list(read_members(plain)) == list(read_members(f"pipe:cat {plain}"))


def test_real_shards_are_read_as_tarfile_reads_them():
    path = shared("captions/flickr8k_ar256") / "00000.tar"
    assert list(read_members(str(path))) == by_tarfile(path)


THIRD = 3 * (512 + 1024)  # bytes of a tar below, where its fourth member begins
DAMAGES = {
    "cut in a member": lambda data: data[: THIRD + 700],
    "cut in a header": lambda data: data[: THIRD + 100],
    "no end": lambda data: data[:THIRD],
    "header overwritten": lambda data: data[:THIRD] + b"\x7f" + data[THIRD + 1 :],
    "a block of zeros for a header": lambda data: data[:THIRD] + bytes(512) + data[THIRD + 512 :],
    "zeros from there on": lambda data: data[:THIRD] + bytes(23 * 512),
    "another archive behind it": lambda data: data[:THIRD] + bytes(1024) + data,
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_from_the_end(tmp_path, damage, compressed):
    path = tmp_path / ("x.tar.gz" if compressed else "x.tar")
    write_tar(tmp_path / "whole.tar", {str(i): {"txt": bytes([65 + i]) * 600} for i in range(6)})
    data = DAMAGES[damage]((tmp_path / "whole.tar").read_bytes())
    path.write_bytes(gzip.compress(data) if compressed else data)
    for read in [read_members] if compressed else [read_members, index_members]:
        names = []
        with pytest.raises(BrokenTar, match=r"x\.tar"):
            for name, *_ in read(str(path)):
                names.append(name)
        assert names == ["0.txt", "1.txt", "2.txt"]


@pytest.mark.parametrize("blocks", [2, 21])
def test_an_archive_may_end_with_as_many_zeros_as_a_record_has(tmp_path, blocks):
    data = Path(write_tar(tmp_path / "x.tar", {"0": pair(0)})).read_bytes().rstrip(b"\0")
    (tmp_path / "y.tar").write_bytes(data + bytes(-len(data) % 512 + blocks * 512))
    assert len(list(read_members(str(tmp_path / "y.tar")))) == 2


def test_a_shard_that_cannot_be_opened_is_counted(tmp_path, caplog):
    assert collect(tmp_path / "gone.tar") == ([], ["unreadable shard"])
    (tmp_path / "text.tar").write_text("this is no archive " * 100)
    assert collect(tmp_path / "text.tar") == ([], ["unreadable shard"])
    (tmp_path / "bad.tar.gz").write_text("this is no archive " * 100)
    assert collect(tmp_path / "bad.tar.gz") == ([], ["unreadable shard"])
    assert len(caplog.records) == 3


def test_members_are_grouped_and_duplicates_dropped(tmp_path):
    path = tmp_path / "set" / "00007.tar"
    members = [
        ("a.JPG", b"1"),
        ("a.txt", b"2"),
        ("a.txt", b"3"),
        ("b.seg.png", b"4"),
        ("a.txt", b"5"),
        (".x", b""),
    ]
    members += [("__meta__.json", b"6"), ("dir/a.jpg", b"7"), ("noending", b"8")]
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found, causes = collect(path)
    assert found == [
        ("set/00007/a", {"jpg": b"1", "txt": b"2"}),
        ("set/00007/b", {"seg.png": b"4"}),
        ("set/00007/dir/a", {"jpg": b"7"}),
    ]
    assert causes == ["duplicate key", "duplicate key"]


def test_the_sample_at_which_an_archive_breaks_is_not_given(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, {"0": pair(0), "1": pair(1)})
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"caption 1") - 512])  # sample 1 has lost its caption
    found, causes = collect(path)
    assert [key for key, _ in found] == [f"{tmp_path.name}/x/0"] and causes == ["unreadable shard"]


def encoded(image, form, **save):
    stream = io.BytesIO()
    image.save(stream, form, **save)
    return stream.getvalue()


def test_images_of_every_kind_become_rgb():
    image = Image.open(io.BytesIO(jpeg(3, (40, 30))))
    for form, kind in (
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "LA"),
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("WEBP", "RGB"),
    ):
        decoded = decode_image(encoded(image.convert(kind), form))
        assert decoded.mode == "RGB" and decoded.size == (40, 30)
    deep = Image.fromarray(np.full((5, 4), 40_000, dtype=np.uint16))
    assert decode_image(encoded(deep, "PNG")).getpixel((0, 0)) == (156, 156, 156)


def test_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    image = Image.new("RGB", (40, 30))
    image.paste((255, 255, 255), (0, 0, 40, 15))
    upright = decode_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (30, 40)
    assert upright.getpixel((25, 20))[0] > 250 and upright.getpixel((5, 20))[0] < 5
    assert decode_image(encoded(image, "JPEG", exif=b"Exif\0\0broken")).size == (40, 30)


@pytest.mark.parametrize("data", [b"", b"no image", jpeg(0)[:150], jpeg(0, (200, 200), quality=95)[:-900]])
def test_broken_images_are_refused(data):
    with pytest.raises(SkippedSample, match="broken image"):
        decode_image(data)


def test_decompression_bombs_are_refused(monkeypatch):
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(SkippedSample, match="oversized image"):
        decode_image(bomb)  # beyond PIL's own limit
    monkeypatch.setattr(samples_module, "_MAX_PIXELS", 100)
    with pytest.raises(SkippedSample, match="oversized image"):
        decode_image(jpeg(0))


def test_large_jpegs_are_decoded_small_but_no_smaller_than_asked():
    data = encoded(Image.open(io.BytesIO(jpeg(1))).resize((900, 700), Image.Resampling.BICUBIC), "JPEG", quality=95)
    assert decode_image(data).size == (900, 700)
    assert decode_pixels(data, 700).shape == (3, 700, 900)
    assert decode_pixels(data, 350).shape == (3, 350, 450)
    assert decode_pixels(data, 100).shape == (3, 175, 225)
    fast = train_transform(100, scale=(1.0, 1.0))(decode_pixels(data, 150), seed=0).float()
    slow = train_transform(100, scale=(1.0, 1.0))(decode_image(data), seed=0).float()
    assert (fast - slow).abs().mean() < 0.6


def as_pil(data):
    """(3, H, W) by PIL alone, or why it is refused."""
    try:
        return torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1)
    except SkippedSample as skipped:
        return skipped.cause


def as_trained(data):
    try:
        return decode_pixels(data, 10_000)
    except SkippedSample as skipped:
        return skipped.cause


def forms(data):
    """The same photograph as the Web may hold it."""
    image, turned = Image.open(io.BytesIO(data)).convert("RGB"), Image.Exif()
    turned[0x0112] = 6
    yield from (data, data + b"trailing", encoded(image, "PNG"), encoded(image, "WEBP"))
    yield from (encoded(image, "JPEG", subsampling=kind, quality=93) for kind in (0, 1, 2))
    yield encoded(image, "JPEG", progressive=True)
    yield encoded(image, "JPEG", keep_rgb=True)
    yield encoded(image, "JPEG", exif=turned)
    yield from (encoded(image.convert(mode), "JPEG") for mode in ("L", "CMYK"))


def test_pixels_for_training_are_those_of_pil():
    for seed in range(4):
        for data in forms(jpeg(seed, (61 + seed, 47), quality=85)):
            assert torch.equal(as_trained(data), as_pil(data))


def test_pixels_for_training_are_those_of_pil_on_photographs():
    shard = str(shared("captions/flickr8k_ar256") / "00000.tar")
    photographs = [data for name, data in read_members(shard) if name.endswith(".jpg")][:40]
    assert len(photographs) == 40 and all(torch.equal(as_trained(data), as_pil(data)) for data in photographs)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 40, 900, 2000])
def test_what_is_cut_off_is_judged_by_pil(cut):
    data = jpeg(2, (200, 150), quality=95)
    mine, pil = as_trained(data[: len(data) - cut]), as_pil(data[: len(data) - cut])
    assert torch.equal(mine, pil) if cut == 0 else mine == pil == "broken image"


@pytest.mark.parametrize("error", [RuntimeError, TypeError, None], ids=["refuses", "other version", "absent"])
def test_pil_decodes_where_torchvision_does_not(monkeypatch, error):
    calls = []

    def operator(*args):
        calls.append(args)
        raise error

    monkeypatch.setattr(samples_module, "_decode_jpeg", operator if error else None)
    assert torch.equal(as_trained(jpeg(0)), as_pil(jpeg(0)))
    assert len(calls) == (1 if error else 0)


def test_torchvision_decodes_where_it_can(monkeypatch):
    if samples_module._decode_jpeg is None:
        pytest.skip("this torchvision has no JPEG decoder")
    expected = as_pil(jpeg(0))
    monkeypatch.setattr(JpegImageFile, "load", None)
    assert torch.equal(as_trained(jpeg(0)), expected)


def test_seeds_are_62_bits_of_key_epoch_and_run():
    seeds = [sample_seed(f"set/00000/{key}", epoch, run) for key in range(40) for epoch in range(5) for run in range(5)]
    assert len(set(seeds)) == 1000 and 0 <= min(seeds) and 2**61 < max(seeds) < 2**62
    assert sample_seed("flickr/00000/1", 3, 0) == 1159112440550966962  # must never change: runs resume by it


def recipe(**options):
    return ImageText(eval_transform(8), tokenize, **options)


def captions(parts, epochs=1, **options):
    shard_recipe = recipe(**options)
    raw = samples_module.RawSample("set/0/k", jpeg(0), parts.get("txt"), parts.get("json"))
    return [shard_recipe.decode(raw, epoch).caption for epoch in range(epochs)]


def test_captions_come_from_the_text_or_the_json():
    assert captions({"txt": b" caption 1\n"}) == ["caption 1"]
    assert captions({"json": b'{"caption": "caption 2"}'}) == ["caption 2"]
    assert captions({"txt": b"caption 1", "json": b'{"caption": "caption 2"}'}) == ["caption 1"]
    assert captions({"txt": b"caption 1", "json": b'{"captions": ['}) == ["caption 1"]
    assert captions({"txt": b"caption 1", "json": b'{"captions": [" ", null]}'}) == ["caption 1"]
    for empty in ({"txt": b" \n"}, {"json": b"{}"}, {"json": b"[1]"}, {"json": b'{"caption": null}'}):
        with pytest.raises(SkippedSample, match="no caption"):
            captions(empty)


def test_one_of_several_captions_is_taken_each_epoch():
    parts = {"txt": b"caption 0", "json": b'{"captions": ["caption 0", "caption 1", "caption 2"]}'}
    taken = captions(parts, epochs=60)
    assert taken == captions(parts, epochs=60)
    assert all(10 < taken.count(f"caption {i}") < 32 for i in range(3))
    assert taken != captions(parts, epochs=60, seed=1)
    assert set(captions(parts, epochs=60, captions_field=None)) == {"caption 0"}


def test_a_shard_gives_whole_pairs_and_counts_the_rest(tmp_path):
    samples = {
        "0": pair(0),
        "1": {"txt": b"caption 1"},
        "2": {"jpg": jpeg(2)},
        "3": {"png": b"x", "json": b"{}"},
    }
    samples |= {"4": {"jpg": b"", "txt": b"caption 4"}}
    causes = []
    raws = list(recipe().read(write_tar(tmp_path / "x.tar", samples), lambda cause, where: causes.append(cause)))
    assert [raw.key[-1] for raw in raws] == ["0", "3"]
    assert causes == ["no image", "no caption", "no image"]


def test_batches_are_collated_and_captions_tokenised_once(tmp_path):
    calls = []

    def counting(texts):
        calls.append(texts)
        return tokenize(texts)

    shard_recipe = ImageText(eval_transform((8, 6)), counting)
    shard = write_tar(tmp_path / "x.tar", {str(i): pair(i % 3) for i in range(6)})
    decoded = [shard_recipe.decode(raw, 0) for raw in shard_recipe.read(shard, calls.append)]
    batch = shard_recipe.collate(decoded)
    again = shard_recipe.collate(decoded)
    assert calls == [["caption 0", "caption 1", "caption 2"]]
    for got in (batch, again):
        assert got["text"][:, 0].tolist() == [0, 1, 2, 0, 1, 2] and got["text"].dtype == torch.int64
        assert got["image"].shape == (6, 3, 8, 6) and got["image"].dtype == torch.uint8
        assert got["seed"].tolist() == [sample.seed for sample in decoded] and got["seed"].unique().numel() == 6
