"""A tiny classifier and generated labelled images, whose loader resumes within an epoch; for one and two processes."""

import lightning as L
import torch

from dtpvit.tasks.classification import Classification

CLASSES = 7


def config(**more):
    reducer = {"class_path": "DynamicPooling", "init_args": {"compression": 4}}
    vision = {"image_size": 32, "patch_size": 4, "dim": 32, "depth": 3, "num_heads": 2}
    return {**vision, "reducers": {1: reducer}, **more}


def task(**options):
    torch.manual_seed(0)
    defaults = {"model": config(), "num_classes": CLASSES, "warmup_steps": 1, "learning_rate": 0.01}
    return Classification(**(defaults | options))


def trained(folder):
    """Weights to start from, classifier included."""
    path = folder / "trained.pt"
    torch.save(task().model.state_dict(), path)
    return str(path)


def images(count, salt=0):
    """Noise over a colour that tells the class."""
    g = torch.Generator().manual_seed(salt)
    label = torch.randint(0, CLASSES, (count,), generator=g)
    colour = torch.randint(0, 128, (CLASSES, 3, 1, 1), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(0, 128, (count, 3, 32, 32), generator=g)
    return (colour[label] + noise).to(torch.uint8), label


class Loader:
    """A rank's part of every batch: shuffled anew in each epoch for training, in order for validation."""

    def __init__(self, count, size, rank, world, train, salt=0, augment=False):
        self.image, self.label = images(count, salt)
        self.size, self.rank, self.world, self.train, self.augment = size, rank, world, train, augment
        self.epoch = self.position = 0
        self.resuming = False

    batch_sampler = None

    @property
    def sampler(self):
        return self

    def set_epoch(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.position, self.resuming = epoch, 0, False

    def __len__(self):
        return -(-len(self.label) // self.size)

    def __iter__(self):
        if not self.resuming:
            self.position = 0
        self.resuming = False
        while self.position < len(self):
            yield self.next_batch()

    def next_batch(self):
        g = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self.label), generator=g) if self.train else torch.arange(len(self.label))
        chosen = order[self.position * self.size :][: self.size].tensor_split(self.world)[self.rank]
        self.position += 1
        batch = {"image": self.image[chosen], "label": self.label[chosen]}
        if self.augment:
            batch["image"] = batch["image"] + torch.randint(0, 9, batch["image"].shape, dtype=torch.uint8, generator=g)
        return {**batch, "seed": chosen + 1000 * self.epoch} if self.train else batch

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position, self.resuming = state["epoch"], state["position"], True


class Images(L.LightningDataModule):
    """24 images in batches of 8, and 13 others to validate on."""

    def __init__(self, augment=False, says_so=False):
        super().__init__()
        self.augment = augment
        if says_so:
            self.augments = augment

    def train_dataloader(self):
        return Loader(24, 8, self.trainer.global_rank, self.trainer.world_size, True, augment=self.augment)

    def val_dataloader(self):
        return Loader(13, 5, self.trainer.global_rank, self.trainer.world_size, False, salt=1)

    test_dataloader = predict_dataloader = val_dataloader


def trainer(**options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    defaults |= {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return L.Trainer(**(defaults | options))


def fit(module, data=None, ckpt_path=None, **options):
    """Train; returns the last validation's figures."""
    run = trainer(**options)
    run.fit(module, datamodule=data or Images(), ckpt_path=ckpt_path, weights_only=True)
    return {name: float(value) for name, value in run.callback_metrics.items()}


class Saved(L.Callback):
    """Saves after some optimizer steps, in the middle of an epoch."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *unused):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Stop(Saved):
    """Saves and dies after some optimizer steps, as a job that is killed."""

    def on_train_batch_end(self, trainer, *unused):
        super().on_train_batch_end(trainer, *unused)
        if trainer.global_step == self.step:
            raise Killed


class SpoilGradient(L.Callback):
    """Makes the gradient of the second step NaN."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step == 1:
            next(module.model.parameters()).grad.fill_(float("nan"))


class Killed(Exception):
    pass


class KeepWeights(L.Callback):
    """Writes the weights and figures of a run in several processes."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save([module.state_dict(), figures], f"{self.folder}/rank{trainer.global_rank}.pt")


def changed(module, before):
    return {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def check_same(found, expected, **tolerance):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, equal_nan=True, msg=name, **(tolerance or {"rtol": 0, "atol": 0})
        )
