"""``dtpvit data get``: img2dataset with the published parameters, once it was said how much that will be."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from json import dumps
from math import ceil
from pathlib import Path
from pprint import pformat
from typing import Literal

from dtpvit.datamodules.address_files import address_files, prepared_list
from dtpvit.datamodules.address_lists import LISTS, AddressList
from dtpvit.datamodules.local_data import check_imagenet, check_llava
from dtpvit.datamodules.shard_count import count
from dtpvit.datamodules.shard_survey import default_workers
from dtpvit.errors import UserError

__all__ = ["get"]

_LOCAL = {"imagenet": check_imagenet, "llava": check_llava}

_SPARK = '''"""For spark-submit. img2dataset must be installed on every machine, and all must see the folders."""
from img2dataset import download
from pyspark.sql import SparkSession

SparkSession.builder.appName("img2dataset").getOrCreate()  # img2dataset uses the session that there is
download(**{options})
'''


def get(
    name: str,
    out: str | None = None,
    addresses: str | None = None,
    yes: bool = False,
    processes: int | None = None,
    threads: int | None = None,
    distributor: Literal["multiprocessing", "pyspark"] = "multiprocessing",
    image_size: int = 256,
    shard_size: int = 10_000,
    timeout: int = 10,
    retries: int = 0,
) -> None:
    """Fetch the images of an address list into shards, or check how ImageNet or LLaVA's data lie on disk.

    img2dataset does the work, with the parameters published for the list but for the resize mode: images keep their
    aspect ratio and are never enlarged, since white borders would be given tokens. Before anything is fetched it is
    said how much that will be. The same command goes on with an unfinished download; at the end samples are counted.

    Args:
        name: cc12m, laion400m; or imagenet or llava, of which nothing is downloaded.
        out: Folder of the shards; data/NAME/shards if not given. For imagenet the folder that holds train and val, for
            llava the one that holds pretrain and finetune.
        addresses: The list: a tsv file of addresses and captions, or a folder of parquet files; by default the one in
            data/NAME.
        yes: Start without asking.
        processes: Of the download; one for each core if not given.
        threads: Of each process; the published number if not given.
        distributor: pyspark downloads nothing but writes a script for spark-submit.
        image_size: The short side; larger images are made smaller.
        shard_size: Addresses a shard.
        timeout: Seconds of silence after which an address is given up.
        retries: Further attempts for each address.

    Raises:
        UserError: If list or img2dataset is missing, nobody agreed, or shards were left unfinished.
    """
    if name in _LOCAL:
        _LOCAL[name](Path(out or f"data/{name}"))
        return
    if name not in LISTS:
        raise UserError(f"There is no address list {name!r}; choose one of {', '.join([*LISTS, *_LOCAL])}.")
    known, folder = LISTS[name], Path(out or f"data/{name}/shards")
    files = address_files(Path(addresses or f"data/{name}/{known.file}"), known)
    program = _program()
    _check_folder(folder)
    source, numbers = prepared_list(files, folder, known, program)
    total, shards = sum(numbers), sum(ceil(number / shard_size) for number in numbers)
    options = {
        "url_list": str(source),
        "input_format": "tsv" if source.suffix == ".tsv" else "parquet",
        "url_col": known.url,
        "caption_col": known.caption,
        "output_format": "webdataset",
        "output_folder": str(folder),
        "processes_count": default_workers() if processes is None else processes,
        "thread_count": known.threads if threads is None else threads,
        "image_size": image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "number_sample_per_shard": shard_size,
        "timeout": timeout,
        "retries": retries,
        **known.options,
    }
    if distributor == "pyspark":
        _write_spark(folder, options)
        return
    done = len(list(folder.glob("*_stats.json")))
    _announce(known, folder, total, shards, done, yes)
    (folder / "sizes.json").unlink(missing_ok=True)  # outdated soon, and img2dataset takes any .json for a shard's
    arguments = [word for option, value in options.items() for word in (f"--{option}", _word(value))]
    print(shlex.join(["img2dataset", *arguments]), flush=True)
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}  # albumentations asks the network at its import
    code = subprocess.run([program, *arguments], env=environment, check=False).returncode
    missing = shards - len(list(folder.glob("*_stats.json")))
    if code or missing > 0:
        raise UserError(
            f"img2dataset ended with code {code} and left {max(0, missing):,} of {shards:,} shards unfinished: run the "
            "same command again, which goes on with these."
        )
    count([str(folder)])


def _word(value: object) -> str:
    return dumps(value) if isinstance(value, list) else str(value)


def _program() -> str:
    """img2dataset, beside this Python or on the path.

    Raises:
        UserError: If it is not installed.
    """
    beside = shutil.which("img2dataset", path=str(Path(sys.executable).parent))
    program = beside or shutil.which("img2dataset")
    if program is None:
        raise UserError(
            "img2dataset is not installed: make an environment of its own for it (it needs an older webdataset), "
            "`pip install img2dataset` there, and put its bin folder on the PATH."
        )
    return program


def _check_folder(folder: Path) -> None:
    strange = [path.name for path in folder.glob("*.json") if not path.name.split("_")[0].isdecimal()]
    if others := [name for name in strange if name != "sizes.json"]:
        raise UserError(
            f"{folder} holds {others[0]}, which img2dataset would take for the record of a shard: move it elsewhere."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}): give --out another one.") from None


def _announce(known: AddressList, folder: Path, total: int, shards: int, done: int, yes: bool) -> None:
    """Say how much is to be fetched; go on only if someone agrees."""
    left = total * max(0, shards - done) / max(1, shards)
    part = left / known.addresses
    size, hours = f"{known.gigabytes * part:,.3g} GB", f"{left / known.per_second / 3600:,.2g} hours"
    free = f"{shutil.disk_usage(folder).free / 1e9:,.0f} GB"
    print(
        f"{total:,} addresses in {shards:,} shards, of which {done:,} are finished; into {folder}.\n"
        f"To fetch: {left:,.0f} addresses, at most about {size} ({free} are free there), about {hours}\n"
        f"at {known.per_second} addresses/s: size and speed as img2dataset's authors report them for 16 cores.\n"
        f"Not every address gives an image: {known.share}."
    )
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("Nothing was fetched, for nobody was there to agree; give --yes to start.")
    if input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was fetched.")


def _write_spark(folder: Path, options: dict[str, object]) -> None:
    script = folder / "download_spark.py"
    absolute = {option: str(Path(str(options[option])).resolve()) for option in ("url_list", "output_folder")}
    keywords = options | absolute | {"distributor": "pyspark"}
    script.write_text(_SPARK.format(options=pformat(keywords, sort_dicts=False)), encoding="utf-8")
    print(f"Wrote {script}: spark-submit --master spark://HOST:7077 {script}")
