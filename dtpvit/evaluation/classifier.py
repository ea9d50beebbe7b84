"""The text side of zero-shot classification: one direction a class, and where an image's label ranks.

Shape letters: B images, C classes, D channels, L context length.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

__all__ = ["Precision", "autocast", "build_classifier", "evaluating", "label_ranks"]

Precision = Literal["fp32", "bf16", "fp16"]

_TOKENISED_AT_ONCE = 1024


@torch.no_grad()
def build_classifier(
    model: nn.Module,
    tokenize: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 512,
    progress: bool = False,
) -> Tensor:
    """Normalised mean of the normalised embeddings of each class's prompts, fp32, shape (D, C).

    The same numbers as open_clip's function of that purpose, with each different prompt encoded once and
    prompts of like length together, so that a text tower whose cost follows the length spends no padding.

    Args:
        model: Its ``encode_text`` maps int64 (B, L) to features (B, D), normalised or not.
        tokenize: Texts to int64 (n, L).
        classnames: C names; one that occurs twice gives two equal columns.
        templates: Functions of a name.
        device: Where the model is and the result will be.
        precision: Of the text tower; normalising and averaging are done in fp32.
        batch_size: Prompts encoded at once.
        progress: Show bars for what takes longer than five seconds.

    Raises:
        ValueError: If there are no names or no templates.
    """
    if not classnames or not templates:
        raise ValueError(f"{len(classnames)} class names and {len(templates)} templates: both must be > 0.")
    prompts = [template(name) for name in classnames for template in templates]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids = _tokenize(tokenize, list(number), progress)
    # Tokenizers that pad with something else than zero give equal lengths here, and the order stays as it is.
    order = (ids != 0).sum(1).argsort(stable=True)
    features: list[Tensor] = []
    with evaluating(model), autocast(device, precision):
        for batch in _bar(order.split(batch_size), "encoding prompts", "batch", progress):
            encoded: Tensor = _method(model, "encode_text")(ids[batch].to(device))
            features.append(F.normalize(encoded.float(), dim=-1))
    embeddings = torch.cat(features)[order.argsort().to(device)]
    member = torch.tensor([number[prompt] for prompt in prompts]).view(len(classnames), len(templates))
    # A class at a time: all of them gathered would be a second copy of every embedding.
    means = torch.stack([embeddings[row].mean(0) for row in member.to(device)], dim=1)
    return F.normalize(means, dim=0)


def label_ranks(features: Tensor, classifier: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before each image's label, 0 being a top-1 hit, int64, shape (B,).

    Of classes with equal scores the one with the lower number stands first (ImageNet has two pairs of classes
    with the same name). An image whose scores are not all finite gets rank C: no NaN is ever a hit.

    Args:
        features: Shape (B, D), any scale.
        classifier: Shape (D, C).
        labels: Columns of the classifier, int64, shape (B,).
    """
    with autocast(features.device, "fp32"):
        logits = F.normalize(features.float(), dim=-1) @ classifier.float()
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=labels.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return rank.where(logits.isfinite().all(1), logits.shape[1])


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """Mixed precision, or for "fp32" none even inside an outer autocast."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "fp32")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module as it was, also those frozen in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tokenize(tokenize: Callable[[list[str]], Tensor], prompts: list[str], progress: bool) -> Tensor:
    starts = range(0, len(prompts), _TOKENISED_AT_ONCE)
    bar = _bar(starts, "tokenising prompts", "batch", progress)
    return torch.cat([tokenize(prompts[start : start + _TOKENISED_AT_ONCE]) for start in bar])


def _bar(items: Sequence[Any], what: str, unit: str, progress: bool) -> Any:
    # disable=None: no bars in log files.
    return tqdm(items, desc=what, unit=unit, delay=5, leave=False, disable=None) if progress else items


def _method(model: nn.Module, name: str) -> Callable[..., Any]:
    return getattr(model, name)  # type checkers see a Tensor | Module in any attribute of a module
