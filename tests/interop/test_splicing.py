"""Splicing images into texts against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtpvit.errors import UserError
from dtpvit.interop.chat import IMAGE_ID
from dtpvit.interop.splicing import IGNORED, splice

FILL = 9


def slow(texts, counts, max_length, *, left):
    """(ids, image, labels) of each text, unpadded, then padded by hand."""
    counts, rows, cuts = iter(counts), [], []
    for ids, supervised in texts:
        sizes = [next(counts) if token == IMAGE_ID else 1 for token in ids]
        room = max_length - sum(size for token, size in zip(ids, sizes, strict=True) if token == IMAGE_ID)
        row, cut = [], 0
        for token, learned, size in zip(ids, supervised, sizes, strict=True):
            if token == IMAGE_ID:
                row += [(FILL, True, IGNORED)] * size
            elif room > 0:
                row.append((token, False, token if learned else IGNORED))
                room -= 1
            else:
                cut += 1
        rows.append(row)
        cuts.append(cut)
    longest = max(map(len, rows))
    padding = [[(FILL, False, IGNORED)] * (longest - len(row)) for row in rows]
    full = [pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)]
    parts = [([True] * len(row), [False] * len(pad)) for row, pad in zip(rows, padding, strict=True)]
    return full, [nothing + there if left else there + nothing for there, nothing in parts], cuts


@st.composite
def conversations(draw):
    texts = []
    for _ in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.sampled_from([1, 2, 3, IMAGE_ID]), min_size=1, max_size=8))
        texts.append((ids, [token != IMAGE_ID and draw(st.booleans()) for token in ids]))
    images = sum(ids.count(IMAGE_ID) for ids, _ in texts)
    return texts, draw(st.lists(st.integers(1, 5), min_size=images, max_size=images))


def padded(texts):
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.full((len(texts), longest), 7)
    supervised = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, (tokens, learned) in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        supervised[row, : len(tokens)] = torch.tensor(learned)
    return ids, torch.tensor([len(tokens) for tokens, _ in texts]), supervised


@given(conversations(), st.booleans(), st.integers(0, 12))
def test_equals_plain_loops(drawn, left, spare):
    texts, counts = drawn
    most = max(sum(counts), 1) + spare  # images always fit, text not always
    found = splice(*padded(texts), torch.tensor(counts, dtype=torch.int64), max_length=most, fill=FILL, left=left)
    wanted, masks, cuts = slow(texts, counts, most, left=left)
    columns = zip(found.ids.tolist(), found.image.tolist(), found.labels.tolist(), strict=True)
    assert [list(zip(*row, strict=True)) for row in columns] == wanted
    assert found.mask.tolist() == masks
    assert found.cut.tolist() == cuts


def test_visual_tokens_go_where_their_image_stood():
    ids, length, supervised = padded([([1, IMAGE_ID, 2], [False] * 3), ([IMAGE_ID, IMAGE_ID], [False] * 2)])
    text = splice(ids, length, supervised, torch.tensor([2, 1, 3]), max_length=10)
    embedded = text.embedded(torch.zeros(2, 4, 1), torch.arange(1.0, 7)[:, None])
    assert embedded[..., 0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]


def test_images_are_never_cut():
    ids, length, supervised = padded([([IMAGE_ID, 1], [False, True])])
    with pytest.raises(UserError, match="the images of one sample have 5 tokens where max_length is 4"):
        splice(ids, length, supervised, torch.tensor([5]), max_length=4)


def test_places_and_images_must_be_as_many():
    ids, length, supervised = padded([([IMAGE_ID, 1], [False, True])])
    with pytest.raises(ValueError, match="1 places for 2 images"):
        splice(ids, length, supervised, torch.tensor([5, 5]), max_length=40)
