"""What reducers can settle on unlabelled images without a step of training: thresholds, and how much tokens matter."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers.base import JointThreshold
from dtpvit.encoder.reducers.routers import SensitivityWeights
from dtpvit.evaluation.agreement import Answers, answers
from dtpvit.interop.pretrained import Pretrained
from dtpvit.tasks.learning_modes import train_reducers
from dtpvit.tasks.sensitivity import fit_sensitivity

__all__ = ["cross_fitted_answers", "fit_reducers", "fit_weights", "has_to_fit"]


def has_to_fit(pretrained: Pretrained) -> bool:
    """Whether a reducer of the model would do otherwise after :func:`fit_reducers`."""
    reducers = pretrained.trunk.reducers
    steered = any(isinstance(reducer, JointThreshold) and not reducer.fixed for reducer in reducers.values())
    return steered or any(isinstance(module, SensitivityWeights) for module in reducers.modules())


def fit_reducers(
    pretrained: Pretrained, images: Tensor, *, batch_size: int, device: torch.device | str, seed: int = 0
) -> None:
    """Fit the weights of tokens in closed form, then let thresholds follow forward passes in training mode.

    Args:
        pretrained: Changed in place, and left in evaluation mode on the device.
        images: Unlabelled, uint8, shape (N, 3, H, W).
        batch_size: Images a pass.
        device: Where to compute.
        seed: Of what is drawn.
    """
    torch.manual_seed(seed)
    trunk = pretrained.trunk
    pretrained.model.to(device).eval()
    pixels = [pretrained.normalise(batch.to(device)) for batch in images.split(batch_size)]
    fit_weights(pretrained, pixels, seed=seed)
    train_reducers(trunk)
    with torch.no_grad():
        for batch in pixels:
            VisionEncoder.forward(trunk, batch)
    trunk.eval()


def fit_weights(pretrained: Pretrained, batches: Sequence[Tensor], *, seed: int = 0) -> dict[int, float]:
    """Fit in closed form how much tokens matter to what the model puts out, where a reducer goes by it.

    Args:
        pretrained: In evaluation mode.
        batches: Normalised, each of shape (B, 3, H, W), on the device of the model.
        seed: Of what is drawn.

    Returns:
        As of :func:`dtpvit.tasks.sensitivity.fit_sensitivity`; empty where there is nothing to fit.
    """
    if not any(isinstance(module, SensitivityWeights) for module in pretrained.trunk.reducers.modules()):
        return {}
    generator = torch.Generator(batches[0].device).manual_seed(seed)
    classes = pretrained.num_classes > 0
    return fit_sensitivity(pretrained.trunk, batches, head=pretrained.head, classes=classes, generator=generator)


def cross_fitted_answers(
    pretrained: Pretrained, images: Tensor, *, batch_size: int, device: torch.device | str, seed: int = 0
) -> Answers:
    """Answers for every image, fitted on the half of the images that it is not in: every other one.

    Args and state as of :func:`fit_reducers`; what is left is fitted on the first half.
    """
    fresh = copy.deepcopy(pretrained.model.state_dict())
    halves = list[Answers]()
    for half in (0, 1):
        pretrained.model.load_state_dict(fresh)
        fit_reducers(pretrained, images[1 - half :: 2], batch_size=batch_size, device=device, seed=seed)
        halves.append(answers(pretrained, images[half::2].split(batch_size), device))
    order = torch.cat((torch.arange(0, len(images), 2), torch.arange(1, len(images), 2))).argsort()

    def together(name: str) -> Tensor:
        return torch.cat([getattr(answer, name) for answer in halves])[order]

    return Answers(together("outputs"), together("macs"), together("decision"), together("tokens"))
