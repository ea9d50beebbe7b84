"""Image-text retrieval: of how many images is a right text among the first k, and the other way round.

Shape letters: N images, M texts, P pairs, D channels, Q images of a chunk.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["positive_ranks", "recall_at_k"]

# Scores are cosines in fp32, whose last bits depend on the order of summation: scores this close are equal.
_TIE = 1e-6
_CHUNK_ELEMENTS = 2**24  # scores held at a time: 64 MiB


def recall_at_k(
    image_features: Tensor, text_features: Tensor, pairs: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at each k and the median rank in both directions, under CLIP_benchmark's names.

    ``text_retrieval_*`` looks for texts given an image, ``image_retrieval_*`` for images given a text. A
    query with several right answers is a hit if one of them is among the first k. Ranks count from 1 and
    are pessimistic: a wrong candidate that ties with the best right one stands before it, so that constant
    features score nothing. Queries without a right answer are not asked, but stay candidates.

    Args:
        image_features: Shape (N, D), normalised or not.
        text_features: Shape (M, D).
        pairs: Which image and which text belong together, int64, shape (P, 2), in any order.
        ks: Cut-offs; one beyond the number of candidates gives 1.

    Raises:
        ValueError: If shapes do not fit, an index is out of range, or features are not finite.
    """
    pairs = _checked(image_features, text_features, pairs)
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    texts_found, images_found = positive_ranks(images, texts, pairs)
    result: dict[str, float] = {}
    for direction, ranks in (("text_retrieval", texts_found), ("image_retrieval", images_found)):
        for k in ks:
            result[f"{direction}_recall@{k}"] = (ranks <= k).double().mean().item()
        result[f"{direction}_median_rank"] = _median(ranks)
    return result


def positive_ranks(
    images: Tensor, texts: Tensor, pairs: Tensor, *, chunk_elements: int = _CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Pessimistic rank, from 1, of the best right answer: of the images that have one, and of such texts.

    Each score is computed once for both directions. At most ``chunk_elements`` are held at a time (or one
    image's, if these are more).

    Args:
        images: Normalised features, shape (N, D).
        texts: Normalised features, shape (M, D).
        pairs: Image and text that belong together, int64, shape (P, 2).
        chunk_elements: Bound on the scores held at a time.

    Returns:
        Ranks among the texts of each image in ``pairs``, and among the images of each text, in the order of
        their indices, int64.
    """
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    right = torch.cat([(images[part[:, 0]] * texts[part[:, 1]]).sum(1) for part in pairs.split(2**14)])
    best_text = right.new_full((len(images),), torch.inf).scatter_reduce(
        0, pairs[:, 0], right, "amax", include_self=False
    )
    best_image = right.new_full((len(texts),), torch.inf).scatter_reduce(
        0, pairs[:, 1], right, "amax", include_self=False
    )
    among_texts = pairs.new_ones(len(images))
    among_images = pairs.new_ones(len(texts))
    size = max(1, chunk_elements // len(texts))
    ends = pairs[:, 0].bincount(minlength=len(images)).cumsum(0).tolist()  # pairs up to and with each image
    for start in range(0, len(images), size):
        stop = min(start + size, len(images))
        own = pairs[ends[start - 1] if start else 0 : ends[stop - 1]]
        scores = images[start:stop] @ texts.T  # (Q, M)
        scores[own[:, 0] - start, own[:, 1]] = -torch.inf  # right answers do not stand in each other's way
        among_texts[start:stop] += (scores >= best_text[start:stop, None] - _TIE).sum(1)
        among_images += (scores >= best_image - _TIE).sum(0)
    return among_texts[best_text.isfinite()], among_images[best_image.isfinite()]


def _checked(image_features: Tensor, text_features: Tensor, pairs: Tensor) -> Tensor:
    """The pairs, on the features' device."""
    shapes = tuple(image_features.shape), tuple(text_features.shape)
    if image_features.dim() != 2 or text_features.dim() != 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"Features must be (N, D) and (M, D), found {shapes[0]} and {shapes[1]}.")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) == 0 or pairs.dtype != torch.int64:
        raise ValueError(f"Pairs must be int64 (P, 2) with P > 0, found {pairs.dtype} {tuple(pairs.shape)}.")
    highest = pairs.amax(0).tolist()
    if int(pairs.min()) < 0 or highest[0] >= len(image_features) or highest[1] >= len(text_features):
        raise ValueError(
            f"Pairs reach from {int(pairs.min())} to image {highest[0]} and text {highest[1]}, beyond the "
            f"{len(image_features)} images and {len(text_features)} texts."
        )
    if not (image_features.isfinite().all() and text_features.isfinite().all()):
        raise ValueError("Features are not all finite: evaluate in fp32 or bf16 instead of fp16.")
    return pairs.to(image_features.device)


def _median(ranks: Tensor) -> float:
    """The middle rank, or the mean of the two in the middle."""
    ordered = ranks.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]).item() / 2
