"""Putting as many places into a text as each of its images has tokens.

Shape letters: B texts, L their longest, M images of all texts, S the longest text with its images' tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtpvit.errors import UserError
from dtpvit.interop.chat import IMAGE_ID

__all__ = ["IGNORED", "Spliced", "independent_parts", "splice"]

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Spliced:
    """Texts with the places of their images' tokens.

    Attributes:
        ids: Token ids, ``fill`` at images and padding, int64, shape (B, S).
        image: Where an image's token belongs, in the order of images and their tokens, bool, shape (B, S).
        labels: Token ids where they are supervised, elsewhere ``IGNORED``, shape (B, S).
        mask: Where there is text or an image, bool, shape (B, S).
        origin: Token of the text that each position comes from, int64, shape (B, S).
        cut: Text tokens of each sample that did not fit, int64, shape (B,).
    """

    ids: Tensor
    image: Tensor
    labels: Tensor
    mask: Tensor
    origin: Tensor
    cut: Tensor

    def embedded(self, text: Tensor, visual: Tensor) -> Tensor:
        """The language model's inputs.

        Args:
            text: Embeddings of ``ids``, shape (B, S, D).
            visual: Of all images' tokens, end to end, shape (T, D).

        Returns:
            Shape (B, S, D).
        """
        return text.masked_scatter(self.image[..., None], visual.to(text.dtype))


def splice(
    ids: Tensor,
    length: Tensor,
    supervised: Tensor,
    counts: Tensor,
    *,
    max_length: int,
    fill: int = 0,
    left: bool = False,
) -> Spliced:
    """Replace each ``IMAGE_ID`` by the places of its image's tokens.

    A text that gets longer than ``max_length`` loses text from its end; of an image nothing is ever cut.

    Args:
        ids: With ``IMAGE_ID`` once for each image, int64, shape (B, L); what lies beyond ``length`` is not looked at.
        length: Tokens of each text, shape (B,).
        supervised: Which are to be learned, bool, shape (B, L).
        counts: Tokens of each image, in the order in which the images occur, int64, shape (M,).
        max_length: Most tokens, images included.
        fill: Id at places that have none.
        left: Pad on the left, as generation wants it.

    Raises:
        UserError: If the images of one text alone have more than ``max_length`` tokens.
        ValueError: If there are not as many images as places.
    """
    there = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    places = (ids == IMAGE_ID) & there
    where = places.flatten().nonzero()[:, 0]
    if len(where) != len(counts):
        raise ValueError(f"the texts have {len(where)} places for {len(counts)} images")
    width = there.to(torch.int64).flatten().index_put((where,), counts).view_as(ids)
    room = max_length - width.masked_fill(~places, 0).sum(1)
    text = there & ~places
    kept = text & (text.cumsum(1) <= room[:, None])
    width = width.masked_fill(text & ~kept, 0)
    end = width.cumsum(1)
    total = end[:, -1]
    longest, least = torch.stack((total.max(), room.min())).tolist()
    if least < 0:
        raise UserError(
            f"the images of one sample have {max_length - least} tokens where max_length is {max_length}; "
            "raise max_length, or compress more"
        )
    out = torch.arange(longest, device=ids.device).expand(len(ids), -1)
    if left:
        out = out - (longest - total)[:, None]
    mask = (out >= 0) & (out < total[:, None])
    origin = torch.searchsorted(end, out.clamp(min=0).contiguous(), right=True).clamp(max=ids.shape[1] - 1)
    image = places.gather(1, origin) & mask
    found = ids.gather(1, origin).masked_fill(image | ~mask, fill)
    learned = supervised.gather(1, origin) & mask & ~image
    return Spliced(found, image, found.masked_fill(~learned, IGNORED), mask, origin, (text & ~kept).sum(1))


def independent_parts(text: Spliced, part: Tensor) -> tuple[Tensor, Tensor]:
    """Let several questions about one image stand behind it in one row without seeing each other.

    Each is then read exactly as if it stood behind the image alone, while the image is encoded and read only once.

    Args:
        text: Padded on the right.
        part: Of each token of the text, int64, shape (B, L): 0 for what all share, which comes first, then 1, 2, ...

    Returns:
        What each position attends to, bool, shape (B, 1, S, S), and the positions' numbers, int64, shape (B, S).
    """
    part = part.gather(1, text.origin).masked_fill(~text.mask, -1)
    place = torch.arange(part.shape[1], device=part.device)
    seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    seen = seen & (place <= place[:, None])
    begins = nn.functional.pad(part[:, 1:] != part[:, :-1], (1, 0))
    start = torch.where(begins, place, 0).cummax(1).values
    shared = (part == 0).sum(1, keepdim=True)
    return seen[:, None], torch.where(part == 0, place, shared + place - start)
