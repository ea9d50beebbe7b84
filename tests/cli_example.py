"""A task and a data module that are real but tiny: what test_cli.py trains through the command line."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dtpvit.errors import UserError


class Points(Dataset):
    def __init__(self, count: int, fail_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 4, generator=generator)
        self.fail_at = fail_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.fail_at:
            raise UserError("found point 3 broken, expected a sound one; fetch the data again.")
        return self.x[index], self.x[index].sum(-1, keepdim=True)


class EpochLoader:
    """Batches of 4 in an order drawn from the epoch, resumable within it."""

    def __init__(self, points: Points, num_workers: int) -> None:
        self.points, self.num_workers = points, num_workers
        self.epoch, self.position = 0, 0
        self.sampler = self  # Lightning tells the epoch to samplers only

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return len(self.points) // 4

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.points), generator=torch.Generator().manual_seed(self.epoch))
        batches = order[: 4 * len(self)].view(-1, 4)[self.position :].tolist()
        for batch in DataLoader(self.points, batch_sampler=batches, num_workers=self.num_workers):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class PointsData(LightningDataModule):
    """``train`` and ``val`` are files whose text is a number of points."""

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        num_workers: int = 0,
        fail_at: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.num_workers, self.fail_at = train, val, num_workers, fail_at
        if train == "refused at construction":
            raise UserError("found nothing,\n  expected points; make some.")

    def _points(self, source: str | list[str] | None) -> Points:
        if not isinstance(source, str) or not Path(source).is_file():
            raise UserError(f"no points at {source!r}; give a file with --data.")
        return Points(int(Path(source).read_text()), self.fail_at)

    def train_dataloader(self) -> "EpochLoader":
        return EpochLoader(self._points(self.train), self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._points(self.val or self.train), 4)


class Line(LightningModule):
    """Linear regression with dropout, so that the random state matters to a resumed run."""

    def __init__(self, lr: float = 0.1, init: str | None = None, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.init = lr, init
        self.net = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 1))
        if init is not None:
            self.load_state_dict(torch.load(init, weights_only=True)["state_dict"])

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean(), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stop(Callback):
    """Ends the process after a batch, by a signal to itself, having saved a checkpoint if it is told where."""

    def __init__(self, at_step: int, by: str = "SIGINT", saves: str | None = None) -> None:
        self.at_step, self.by, self.saves = at_step, by, saves

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at_step:
            if self.saves is not None:
                trainer.save_checkpoint(self.saves)
            os.kill(os.getpid(), getattr(signal, self.by))


class FullDisk(Callback):
    """From a step on no file of this process grows beyond 100 kB, and its checkpoints are larger."""

    def __init__(self, at_step: int) -> None:
        self.at_step, self.ballast = at_step, 1

    def state_dict(self) -> dict[str, Any]:
        return {"ballast": torch.zeros(self.ballast)}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at_step:
            self.ballast = 100_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


class FullDiskFor(Callback):
    """From a step on a file of the run is written to a disk that is full."""

    def __init__(self, at_step: int, file: str) -> None:
        self.at_step, self.file = at_step, file

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.at_step:
            path = Path(trainer.default_root_dir) / self.file
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/full")


class OtherData(PointsData):
    """A second class for ``--data``."""
