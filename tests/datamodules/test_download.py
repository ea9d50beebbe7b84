"""From an address list to counted samples, over a real web server and the real img2dataset."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
from conversation_files import llava
from shard_files import jpeg, shared
from web_server import serving

from dtpvit.cli import main
from dtpvit.datamodules import download
from dtpvit.datamodules.address_files import address_files, prepared_list
from dtpvit.datamodules.address_lists import LISTS
from dtpvit.datamodules.tars import read_members
from dtpvit.errors import UserError


@pytest.fixture
def img2dataset():
    beside = shutil.which("img2dataset", path=str(Path(sys.executable).parent))
    if (beside or shutil.which("img2dataset")) is None:
        pytest.skip("needs img2dataset on the PATH, in an environment of its own")


IMAGENET_SYNSETS = (Path(timm.data.__file__).parent / "_info" / "imagenet_synsets.txt").read_text().split()
KINDS = ("good", "good", "missing", "slow", "cut", "html", "good", "png", "gone", "small")
CAPTION = "caption \"{0}\" of kind {1}, an ünïcode 'text'"


@pytest.fixture
def web():
    """A server that answers each address by its kind; nothing else is asked for."""
    over = threading.Event()

    def answer(handler, path, number):
        _, kind, name = path.split("/")
        image = jpeg(int(name), (320, 400), quality=90)
        if kind in ("good", "small", "png"):
            handler.give(image if kind != "small" else jpeg(int(name), (40, 20)))
        elif kind == "missing":
            handler.give(b"no", "text/html", 404)
        elif kind == "gone":
            handler.give(b"no", "text/html", 410)
        elif kind == "html":
            handler.give(b"<html>moved</html>", "text/html")
        elif kind == "cut":
            handler.give(image, stop=len(image) // 2)
        elif kind == "slow":
            over.wait(60)

    with serving(answer, ranges=False) as server:
        yield server
        over.set()


def write_list(path, server, count=30):
    kinds = [KINDS[n % len(KINDS)] for n in range(count)]
    lines = [f"{server.address}/{kind}/{n}\t{CAPTION.format(n, kind)}" for n, kind in enumerate(kinds)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_download_says_exactly_what_was_usable(tmp_path, web, img2dataset, monkeypatch, capfd):
    write_list(tmp_path / "list.tsv", web)
    out = tmp_path / "shards"
    command = ["data", "get", "cc12m", "--addresses", str(tmp_path / "list.tsv"), "--out", str(out), "--yes"]
    command += ["--processes", "1", "--threads", "8", "--shard_size", "10", "--timeout", "2"]
    assert main(command) == 0
    said = capfd.readouterr().out
    assert "30 addresses in 3 shards, of which 0 are finished" in said
    assert "15 of 30 addresses are usable (50 %), in 3 shards." in said
    assert json.loads((out / "sizes.json").read_text()) == {f"{n:05d}.tar": 5 for n in range(3)}
    assert main(["data", "count", str(out), "--json", str(tmp_path / "count.json")]) == 0
    record = json.loads((tmp_path / "count.json").read_text())
    assert record["causes"] == {
        "HTTP 404": 3,
        "HTTP 410": 3,
        "timed out": 3,
        "answer cut off": 3,
        "not an image, or a broken one": 3,
    }
    assert main(["data", "check", str(out), "--workers", "1", "--json", str(tmp_path / "check.json")]) == 0
    sizes = json.loads((tmp_path / "check.json").read_text())["percentiles"]
    assert (sizes["short side"]["0"], sizes["short side"]["100"], sizes["height"]["100"]) == (20, 256, 320)
    members = [member for shard in sorted(out.glob("*.tar")) for member in read_members(str(shard))]
    captions = {data.decode() for name, data in members if name.endswith(".txt")}
    usable = ("good", "png", "small")
    assert captions == {CAPTION.format(n, KINDS[n % 10]) for n in range(30) if KINDS[n % 10] in usable}

    # Going on: one shard was never finished, sizes.json lies about, and what is complete is not asked for again.
    (out / "00001_stats.json").unlink()
    web.requests.clear()
    assert main(command) == 0
    assert "of which 2 are finished" in capfd.readouterr().out
    assert {int(path.rpartition("/")[2]) for path in web.requests} == set(range(10, 20))
    assert main(["data", "count", str(out)]) == 0 and "15 of 30" in capfd.readouterr().out


def test_parquet_lists_are_counted_and_fetched(tmp_path, web, img2dataset, capfd):
    code = (
        "import sys, pyarrow as a, pyarrow.parquet as p; "
        "p.write_table(a.table({'URL': [f'{sys.argv[1]}/good/{n}' for n in range(7)], 'TEXT': ['x'] * 7, "
        "'NSFW': ['UNLIKELY'] * 7, 'similarity': [0.3] * 7, 'LICENSE': ['?'] * 7}), sys.argv[2])"
    )
    python = Path(download._program()).parent / "python"
    (tmp_path / "meta").mkdir()
    for part in range(2):
        subprocess.run([python, "-c", code, web.address, tmp_path / "meta" / f"{part}.parquet"], check=True)
    command = ["data", "get", "laion400m", "--addresses", str(tmp_path / "meta"), "--out", str(tmp_path / "shards")]
    assert main([*command, "--yes", "--processes", "1", "--threads", "4", "--shard_size", "5"]) == 0
    said = capfd.readouterr().out
    assert "14 addresses in 4 shards" in said and "14 of 14 addresses are usable (100 %)" in said
    meta = [json.loads(data) for name, data in read_members(str(tmp_path / "shards" / "00000.tar")) if "json" in name]
    assert {record["NSFW"] for record in meta} == {"UNLIKELY"}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program of img2dataset's name that must not be run."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "img2dataset"
    path.write_text("#!/bin/sh\nexit 7\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(download.sys, "executable", str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)
    return path


def test_nothing_is_fetched_before_somebody_agrees(tmp_path, program, monkeypatch, capsys):
    (tmp_path / "l.tsv").write_text("http://127.0.0.1:1/a\tx\n" * 1234)
    command = ["data", "get", "cc12m", "--addresses", "l.tsv", "--out", "shards"]
    monkeypatch.setattr("sys.stdin", io.StringIO("yes"))  # no terminal
    assert main(command) == 2
    said = capsys.readouterr()
    assert "give --yes to start" in said.err and "To fetch: 1,234 addresses, at most about 0.0329 GB" in said.out
    assert "62 to 64 %" in said.out
    assert main([*command, "--yes"]) == 2
    assert "ended with code 7 and left 1 of 1 shards unfinished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mnist"], "choose one of cc12m, laion400m, imagenet, llava"),
        (["cc12m"], "no address list at data/cc12m/cc12m.tsv: get it from https://github.com"),
        (["cc12m", "--addresses", "l.txt"], "neither .tsv nor .parquet"),
        (["cc12m", "--addresses", "empty.tsv"], "holds no addresses"),
        (["cc12m", "--addresses", "l.tsv", "--out", "odd"], "holds notes.json, which img2dataset would take"),
        (["laion400m", "--addresses", "l.parquet"], "cannot be counted"),
        (["imagenet"], "had only from https://image-net.org"),
        (["llava"], "blip_laion_cc_sbu_558k.json does not exist: data/llava/README.md says where"),
    ],
)
def test_mistakes_are_said_before_anything_is_fetched(tmp_path, program, capsys, arguments, sentence):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.json").write_text("{}")
    for name in ("l.tsv", "l.txt", "l.parquet"):
        (tmp_path / name).write_text("http://127.0.0.1:1/a\tx\n")
    (tmp_path / "empty.tsv").write_text("")
    assert main(["data", "get", *arguments, "--yes"]) == 2
    assert sentence in capsys.readouterr().err


def test_without_img2dataset_it_is_said_how_to_get_it(tmp_path, program, monkeypatch, capsys):
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "l.tsv").write_text("http://127.0.0.1:1/a\tx\n")
    assert main(["data", "get", "cc12m", "--addresses", "l.tsv"]) == 2
    assert "an environment of its own" in capsys.readouterr().err


def test_a_script_for_a_cluster_holds_the_same_parameters(tmp_path, program, monkeypatch, capsys):
    (tmp_path / "l.tsv").write_text("http://127.0.0.1:1/a\tx\n")
    assert main(["data", "get", "cc12m", "--addresses", "l.tsv", "--out", "s", "--distributor", "pyspark"]) == 0
    script = (tmp_path / "s" / "download_spark.py").read_text()
    given = {}
    code = script.replace("from img2dataset import download", "").replace("from pyspark.sql import SparkSession", "")
    exec(code.replace("SparkSession.builder", "None and None"), {"download": given.update})
    assert given["distributor"] == "pyspark" and given["resize_mode"] == "keep_ratio" and given["resize_only_if_bigger"]
    assert given["disallowed_header_directives"] == ["noai", "noindex"]
    assert Path(given["url_list"]) == tmp_path / "s" / "addresses.tsv" and given["output_folder"] == str(tmp_path / "s")


def test_lines_come_in_either_order_and_quotes_survive(tmp_path, capsys):
    lines = [
        'http://x/1\t"half a quotation',
        "a caption\thttp://x/2",
        "no address",
        "http://x/3\ta\tb",
        'http://x/4\t"q"\r.',
    ]
    (tmp_path / "l.tsv").write_text("\n".join(lines))
    source, numbers = prepared_list([tmp_path / "l.tsv"], tmp_path, LISTS["cc12m"], "")
    assert numbers == [3] and "left out 2 lines" in capsys.readouterr().err
    assert source.read_text().splitlines() == [
        "url\tcaption",
        'http://x/1\t"""half a quotation"',
        "http://x/2\ta caption",
        'http://x/4\t"""q"" ."',
    ]


def test_a_header_is_not_an_address(tmp_path):
    (tmp_path / "l.tsv").write_text("url\tcaption\nhttp://x/1\tone\n")
    assert prepared_list([tmp_path / "l.tsv"], tmp_path, LISTS["cc12m"], "")[1] == [1]


def test_a_published_list_is_read_whole(tmp_path):
    files = address_files(shared("urls") / "cc3m_validation_1500.tsv", LISTS["cc12m"])
    source, numbers = prepared_list(files, tmp_path, LISTS["cc12m"], "")
    assert numbers == [1500] and source.read_text(encoding="utf-8").count("\nhttp") == 1500


def test_imagenet_is_checked_and_never_fetched(tmp_path, monkeypatch):
    for wnid in IMAGENET_SYNSETS:
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / "a.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match="holds 1,000 images where ImageNet-1k has 1,281,167"):
        download.get("imagenet", out=str(tmp_path))
    (tmp_path / "train" / IMAGENET_SYNSETS[0] / "a.JPEG").unlink()
    (tmp_path / "train" / IMAGENET_SYNSETS[0]).rmdir()
    with pytest.raises(UserError, match="999"):
        download.get("imagenet", out=str(tmp_path))


def test_llavas_records_are_counted_with_the_folders_of_missing_images(tmp_path, capsys):
    def write(name, images):
        records = [llava(number) | {"image": image} for number, image in enumerate(images)]
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(records))
        for image in images[:2]:
            path = tmp_path / name.split("/")[0] / "images" / image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(0))

    write("pretrain/blip_laion_cc_sbu_558k.json", ["00000/0.jpg", "00000/1.jpg"])
    write("finetune/llava_v1_5_mix665k.json", ["coco/train2017/0.jpg", "coco/train2017/1.jpg", "gqa/images/2.jpg"])
    with pytest.raises(UserError, match=r"1 records of .* cannot be used \(missing image, gqa/images: 1\)"):
        download.get("llava", out=str(tmp_path))
    said = capsys.readouterr().out
    assert "558k.json: 2 of 2 records can be used" in said and "665k.json: 2 of 3 records" in said
