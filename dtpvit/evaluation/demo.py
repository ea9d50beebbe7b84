"""``dtpvit demo``: a page on this machine where one drops an image and sees what becomes of its tokens."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
from tempfile import TemporaryDirectory

from dtpvit.errors import UserError
from dtpvit.evaluation.arguments import chosen_device
from dtpvit.evaluation.demo_view import DemoTower
from dtpvit.evaluation.shown_towers import shown_towers

__all__ = ["demo"]


def demo(
    checkpoint: list[str] | None = None,
    model: str | None = None,
    init: str | None = None,
    reducers: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Serve a page where one drops an image, moves the compression, and sees segments, tokens and cost beside dense.

    A checkpoint of the contrastive task also scores the labels that one types. Nothing leaves this machine, and the
    page needs no network.

    Args:
        checkpoint: Checkpoints of any task, exported folders, or names and configs, whose weights are random.
        model: timm's name of a Vision Transformer, or open_clip's of a CLIP with one, for --reducers.
        init: Its weights: a file, or a tag; what timm or open_clip download where it is left out.
        reducers: YAML files, such as configs/reducers/tome.yaml, each a choice on the page.
        host: Address to listen on; 0.0.0.0 lets other machines in, without a password.
        port: Port to listen on.
        device: auto, cpu, cuda, cuda:1, ...
    """
    _check_installed()
    _check_free(host, port)
    place = chosen_device(device)
    towers = shown_towers(checkpoint or [], model, init, reducers or [])

    from dtpvit.evaluation.demo_page import serve

    print(f"dtpvit: http://{host}:{port} shows {'; '.join(tower.name for tower in towers)}; Ctrl-C ends it", flush=True)
    with TemporaryDirectory(prefix="dtpvit-demo-") as folder:  # what is dropped on the page goes when the server does
        os.environ["GRADIO_TEMP_DIR"] = folder
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        serve({tower.name: DemoTower(tower, place) for tower in towers}, host, port)


def _check_installed() -> None:
    # Read when gradio is imported: what of it would send anything is off before that.
    for name, value in (("GRADIO_ANALYTICS_ENABLED", "False"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
        os.environ[name] = value
    try:
        importlib.import_module("gradio")
    except ImportError as error:
        raise UserError("the package gradio is not installed; pip install dtpvit[demo]") from error


def _check_free(host: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server just ended holds no port
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port} ({error}); give another --port, or --host") from error
