"""The ways of pooling that are compared: one base, and one change of it a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ROWS", "Row"]

BLOCK, COMPRESSION = 4, 4


@dataclass(frozen=True)
class Row:
    """One way.

    Attributes:
        what: In words, for the table.
        reducers: As in a vision config; empty is the dense model.
        options: More options of `dtpvit fit`.
    """

    what: str
    reducers: dict[Any, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def _learned(what: str, *options: str, block: int = BLOCK, **arguments: Any) -> Row:
    """Dynamic pooling, learned, with its defaults but for ``arguments``."""
    arguments = {"compression": COMPRESSION, **arguments}
    return Row(what, {block: {"class_path": "DynamicPooling", "init_args": arguments}}, options)


def _control(what: str, name: str, **arguments: Any) -> Row:
    return Row(what, {BLOCK: {"class_path": name, "init_args": arguments}})


_HOLD = {"estimator": "symmetric", "rate_weight": 1.0}

_IMITATION = {"router": "local", "estimator": "imitation"}

ROWS: dict[str, Row] = {
    "dense": Row("dense"),
    "base": _learned("base: MLP router, regressed votes, quantile, Hilbert, 4x before block 4"),
    "random": _control("random boundaries", "RandomBoundaries", compression=COMPRESSION, order="hilbert"),
    "stride": _control("fixed stride", "FixedStride", compression=COMPRESSION, order="hilbert"),
    "grid": _control("2x2 grid", "GridPooling", window=2),
    "minimum_variance": _learned("minimum variance, exact, nothing learned", router="minimum_variance"),
    "sensitivity": _learned("exact, tokens weighted, the weights learned", router="sensitivity"),
    "imitation": _learned("local router, imitation, fixed budget", **_IMITATION, budget="fixed"),
    "imitation_dynamic": _learned("local router, imitation, dynamic budget", **_IMITATION),
    "cosine": _learned("cosine router", router="cosine"),
    "dtp": _learned("estimator: DTP's", estimator="dtp"),
    "symmetric": _learned("estimator: symmetric vote", estimator="symmetric"),
    "gate": _learned("estimator: H-Net's gate", estimator="gate"),
    "cosine_gate": _learned("cosine router, H-Net's gate", router="cosine", estimator="gate"),
    "binomial": _learned("rate: binomial loss (symmetric vote)", rate="binomial", **_HOLD),
    "ratio": _learned("rate: ratio loss (symmetric vote)", rate="ratio", **_HOLD),
    "band": _learned("rate: band loss (symmetric vote)", rate="band", **_HOLD),
    "fixed": _learned("budget: the same for every image", budget="fixed"),
    "raster": _learned("order: raster", order="raster"),
    "serpentine": _learned("order: serpentine", order="serpentine"),
    "before_2": _learned("before block 2", block=2),
    "before_6": _learned("before block 6", block=6),
    "2x": _learned("2x", compression=2),
    "10x": _learned("10x", compression=10),
    "stride_10x": _control("fixed stride, 10x", "FixedStride", compression=10, order="hilbert"),
    "slow": _learned("predictor's learning rate / 5", "--model.init_args.predictor_lr_scale", "1.0"),
    "cold": _learned("temperature 0.1 (symmetric vote)", estimator="symmetric", temperature=0.1),
}

# Published methods: what configs/reducers/NAME.yaml holds, where no row above has that name.
for _path in sorted((Path(__file__).parents[1] / "configs" / "reducers").glob("*.yaml")):
    _title = _path.read_text(encoding="utf-8").removeprefix("# ").split("\n")[0].split(" (")[0].split(":")[0]
    ROWS.setdefault(_path.stem, Row(_title, yaml.safe_load(_path.read_text(encoding="utf-8"))))
