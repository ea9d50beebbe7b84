import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtpvit.evaluation.retrieval import positive_ranks, recall_at_k


def slow_ranks(queries: Tensor, candidates: Tensor, pairs: list[tuple[int, int]]) -> list[int]:
    """Rank of each asked query's best answer by sorting; wrong candidates go first among equals."""
    ranks = []
    for query in sorted({q for q, _ in pairs}):
        right = {c for q, c in pairs if q == query}
        scores = [round(float(queries[query].double() @ candidate.double()), 6) for candidate in candidates]
        order = sorted(range(len(candidates)), key=lambda c: (-scores[c], c in right))
        best = min(order.index(c) for c in right)
        ranks.append(1 + sum(1 for c in order[:best] if c not in right))
    return ranks


def scores_on_a_grid(count: int, generator: torch.Generator) -> Tensor:
    """Unit vectors of which many are equal, so that ties are common; cosines are multiples of a quarter."""
    signs = torch.randint(0, 2, (count, 8), generator=generator) * 2.0 - 1
    return F.normalize(signs, dim=1)


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 12),
    texts=st.integers(1, 12),
    num_pairs=st.integers(1, 30),
    chunk=st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_ranks_equal_those_of_a_plain_sort(seed, images, texts, num_pairs, chunk):
    generator = torch.Generator().manual_seed(seed)
    queries, candidates = scores_on_a_grid(images, generator), scores_on_a_grid(texts, generator)
    pairs = [
        (
            int(torch.randint(images, (), generator=generator)),
            int(torch.randint(texts, (), generator=generator)),
        )
        for _ in range(num_pairs)
    ]
    forth, back = positive_ranks(queries, candidates, torch.tensor(pairs), chunk_elements=chunk)
    assert forth.tolist() == slow_ranks(queries, candidates, pairs)
    assert back.tolist() == slow_ranks(candidates, queries, [(c, q) for q, c in pairs])


def test_both_directions_with_five_captions_an_image():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 16, generator=generator)
    texts = images.repeat_interleave(5, 0) + 2.5 * torch.randn(150, 16, generator=generator)
    pairs = torch.stack([torch.arange(150) // 5, torch.arange(150)], dim=1)
    pairs = pairs[torch.randperm(150, generator=generator)]
    result = recall_at_k(3 * images, texts, pairs, ks=(1, 3, 200))
    unit_images, unit_texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    to_text = slow_ranks(unit_images, unit_texts, pairs.tolist())
    to_image = slow_ranks(unit_texts, unit_images, pairs.flip(1).tolist())
    for direction, ranks in (("text_retrieval", to_text), ("image_retrieval", to_image)):
        for k in (1, 3):
            share = sum(rank <= k for rank in ranks) / len(ranks)
            assert result[f"{direction}_recall@{k}"] == pytest.approx(share)
            assert 0 < share < 1
        assert result[f"{direction}_recall@200"] == 1
        ordered = sorted(ranks)
        middle = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
        assert result[f"{direction}_median_rank"] == middle


def test_a_collapsed_encoder_scores_nothing():
    constant = torch.full((20, 8), 0.3) + 1e-9 * torch.arange(20)[:, None]
    result = recall_at_k(constant, constant, torch.arange(20)[:, None].expand(20, 2), ks=(1, 10))
    assert result["text_retrieval_recall@10"] == result["image_retrieval_recall@10"] == 0
    assert result["text_retrieval_median_rank"] == 20


def test_the_same_caption_under_another_image_is_a_tie_and_no_hit():
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 1, 2, 2]]  # image 3's caption says what image 2 shows
    pairs = torch.arange(4)[:, None].expand(4, 2)
    among_texts, among_images = positive_ranks(images, texts, pairs)
    assert among_texts.tolist() == [1, 1, 2, 4]
    assert among_images.tolist() == [1, 1, 1, 4]


def test_queries_without_an_answer_are_not_asked_but_can_be_answers():
    images = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=1)
    texts = F.normalize(torch.tensor([[0.9, 0.5], [0.0, 1.0]]), dim=1)
    pairs = torch.tensor([[0, 0], [2, 1]])
    among_texts, among_images = positive_ranks(images, texts, pairs)
    assert among_texts.tolist() == [1, 1]
    assert among_images.tolist() == [2, 1]  # image 1 suits text 0 better
    assert recall_at_k(images, texts, pairs)["image_retrieval_median_rank"] == 1.5


@pytest.mark.parametrize(
    ("images", "texts", "pairs", "found"),
    [
        ((3, 4), (3, 5), [[0, 0]], "must be"),
        ((3, 4), (2, 4), [[0, 2]], "text 2"),
        ((3, 4), (2, 4), [[-1, 0]], "from -1"),
        ((3, 4), (2, 4), [[3, 1]], "image 3"),
        ((3, 4), (2, 4), [[0.0, 1.0]], "int64"),
    ],
)
def test_what_does_not_fit_is_refused(images, texts, pairs, found):
    with pytest.raises(ValueError, match=found):
        recall_at_k(torch.ones(images), torch.ones(texts), torch.tensor(pairs))


def test_features_that_overflowed_are_refused():
    features = torch.eye(3)
    broken = features.clone()
    broken[1, 1] = torch.nan
    with pytest.raises(ValueError, match="not all finite"):
        recall_at_k(features, broken, torch.tensor([[0, 0]]))
