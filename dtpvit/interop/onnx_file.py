"""Image towers as ONNX files: images in, features out, any number of images at a time."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtpvit.encoder import ImageEncoder, VisualTower
from dtpvit.encoder.reducers import TokenReducer
from dtpvit.errors import UserError

__all__ = ["write_onnx"]

_OPSET = 20  # the first with GELU
_TRACED_BATCH = 3  # not 1 and not 2, which torch.export or a broadcast might take for a constant
_TOLERANCE = 1e-4


class _Features(nn.Module):
    def __init__(self, encoder: ImageEncoder | VisualTower) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        found = self.encoder(images)
        return found if isinstance(found, Tensor) else found.pooled


def write_onnx(
    encoder: ImageEncoder | VisualTower, path: str | Path, *, notes: Mapping[str, str] | None = None
) -> float:
    """Write one ONNX file, weights included, and compare it with the encoder in onnxruntime.

    Its input ``images`` has shape (batch, channels, height, width), normalised, its output ``features`` (batch, D): the
    read-out of an encoder, or a tower's projection of it, not normalised; both float32, the batch of any size.

    Args:
        encoder: On the CPU, float32; left in evaluation mode.
        path: The file; an existing one is replaced.
        notes: Metadata of the file, such as the channel means.

    Returns:
        Largest difference to PyTorch on random images in a batch of another size than the one traced.

    Raises:
        UserError: If a reducer's token counts are not static, the ONNX packages are absent, or the results differ by
            more than 1e-4 of the largest feature.
    """
    trunk = encoder.trunk if isinstance(encoder, VisualTower) else encoder
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the ONNX file to write")
    _check_static(trunk)
    _check_installed()
    module = _Features(encoder.eval()).eval()
    images = torch.randn(
        _TRACED_BATCH, trunk.in_channels, *trunk.image_size, generator=torch.Generator().manual_seed(0)
    )
    with _quiet():
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["features"],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(notes or {})
    path = Path(path)
    draft = path.with_name(f"{path.name}.tmp")
    try:
        program.save(str(draft), external_data=False)
        difference = _difference(module, draft, images[: _TRACED_BATCH - 1])
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return difference


def _check_static(trunk: ImageEncoder) -> None:
    for block, reducer in trunk.reducers.items():
        assert isinstance(reducer, TokenReducer)
        where = f"{type(reducer).__name__} at block {block}"
        if reducer.draws == "always":
            raise UserError(
                f"{where} draws from a checksum of the pixels, which ONNX cannot compute; use another reducer"
            )
        if not reducer.fixed:
            raise UserError(
                f"{where} has a dynamic budget, an ONNX file needs static shapes; "
                "--budget fixed keeps the weights and gives every image the same number of tokens"
            )


def _check_installed() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"the package {package} is not installed; pip install dtpvit[onnx]") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter says about its own insides."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _difference(module: nn.Module, path: str | Path, images: Tensor) -> float:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        expected = module(images)
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"onnxruntime computes features that differ by {difference:.1e}; no file is written, report this"
        )
    return difference
