"""Merging in windows against a slow reference with loops, written from the description of the method."""

import pytest
import torch

from dtpvit.encoder import Tokens, VisionEncoder
from dtpvit.encoder.ops.noise import uniform_noise
from dtpvit.encoder.reducers import Evidence, RandomBoundaries, WindowedToMe
from dtpvit.evaluation.cost import counted_macs, image_cost


def windows(rows, columns, side):
    """Cells of each window, and the 2 x 2 parts of each: lists of (row, column), in raster order of the parts."""
    found = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            cells = [(r, c) for r in range(top, min(top + side, rows)) for c in range(left, min(left + side, columns))]
            parts = sorted({(r // 2, c // 2) for r, c in cells})
            found.append((cells, parts))
    return found


def closest(keys, me, targets):
    """The target most similar to ``me`` by cosine, the earlier one of equals."""
    cosines = [float(keys[me] @ keys[t] / (keys[me].norm() * keys[t].norm())) for t in targets]
    return targets[cosines.index(max(cosines))]


def draw(noise, count, wanted):
    """The ``wanted`` of ``count`` places with the least noise, ascending."""
    return sorted(sorted(range(count), key=lambda place: float(noise[place]))[:wanted])


def slow_groups(keys, size, grid, side, matching, noise):
    """For each token that is left, by its place on the coarse grid, the raster indices of its members."""
    rows, columns = grid
    wide = -(-columns // 2)
    groups = {}
    for cells, parts in windows(rows, columns, side):
        mine = [r * columns + c for r, c in cells]
        own = {place: keys[cell] for place, cell in enumerate(mine)}
        members = {place: [place] for place in own}
        if matching == "parts":
            inside = [[p for p, (r, c) in enumerate(cells) if (r // 2, c // 2) == part] for part in parts]
            targets = [min(some, key=lambda place: float(noise[place])) for some in inside]
        elif matching == "random":
            targets = draw(noise, len(cells), len(parts))
        else:
            first = draw(noise, len(cells), -(-len(cells) // 2))
            goes = {p: p if p in first else closest(own, p, first) for p in own}
            members = {place: [p for p in goes if goes[p] == target] for place, target in enumerate(first)}
            own = {
                place: sum(keys[mine[p]] * size[mine[p]] for p in some) / sum(size[mine[p]] for p in some)
                for place, some in members.items()
            }
            targets = draw(noise[side**2 :], len(first), len(parts))
        for number, target in enumerate(targets):
            row, column = parts[number]
            goes = [p for p in own if (p if p in targets else closest(own, p, targets)) == target]
            groups[row * wide + column] = sorted(mine[m] for p in goes for m in members[p])
    return groups


@pytest.mark.parametrize("matching", ["random", "two_rounds", "parts"])
@pytest.mark.parametrize("grid", [(8, 8), (6, 6), (7, 5), (1, 3)], ids=str)
@pytest.mark.parametrize(("training", "prefix"), [(True, 0), (False, 0), (False, 2)])
@pytest.mark.parametrize("by_size", [True, False])
def test_it_equals_the_slow_reference(matching, grid, training, prefix, by_size):
    cells, batch = grid[0] * grid[1], 3
    tokens = Tokens.from_dense(
        torch.randn(batch, prefix + cells, 6), num_prefix=prefix, grid=grid, seed=torch.tensor([3, 1, 4])
    )
    size = torch.where(tokens.layout.prefix, 1.0, torch.randint(1, 5, tokens.size.shape).float())
    tokens = Tokens(tokens.features, tokens.layout, size, tokens.source, tokens.patches, grid, tokens.seed)
    keys = torch.randn(len(tokens.features), 4)
    reducer = WindowedToMe(6, matching=matching, by_size=by_size, proportional=by_size).train(training)
    found = reducer(tokens, Evidence(keys=keys)).tokens
    coarse = -(-grid[0] // 2), -(-grid[1] // 2)
    assert found.grid == coarse and found.lengths.tolist() == [prefix + coarse[0] * coarse[1]] * batch
    for image, (before, own, after) in enumerate(zip(tokens.split(), keys.chunk(batch), found.split(), strict=True)):
        noise = uniform_noise(torch.tensor([3, 1, 4])[image] if training else torch.tensor(0), torch.arange(32))
        if matching == "parts" and not training:
            noise = torch.arange(32)
        counted = before.size[prefix:] if by_size else torch.ones(cells)
        groups = slow_groups(own[prefix:], counted, grid, 4, matching, noise)
        assert sorted(groups) == list(range(coarse[0] * coarse[1]))
        for place, members in groups.items():
            weight = counted[members]
            mean = (before.features[prefix:][members] * weight[:, None]).sum(0) / weight.sum()
            torch.testing.assert_close(after.features[prefix + place], mean)
            mine = weight.sum() if by_size else before.size[prefix:].sum() / len(groups)  # or all alike
            assert after.size[prefix + place] == mine and (after.source[members] == place).all()
        assert torch.equal(after.features[:prefix], before.features[:prefix]) and (after.size[:prefix] == 1).all()
        assert (after.key_bias is None) != by_size


def test_of_sixteen_tokens_four_are_left_and_each_part_has_its_own_target():
    tokens = Tokens.from_dense(torch.randn(1, 16, 6), grid=(4, 4))
    keys = torch.eye(16)  # nothing is alike
    found = WindowedToMe(6, matching="parts").eval()(tokens, Evidence(keys=keys)).tokens
    assert found.layout.total == 4
    assert [int(found.source[cell]) for cell in (0, 2, 8, 10)] == [0, 1, 2, 3]


def test_cost_in_a_plain_transformer_equals_torch_s_counter():
    reducers = {1: WindowedToMe(32, matching="two_rounds"), 2: WindowedToMe(32)}
    encoder = VisionEncoder(image_size=64, patch_size=4, dim=32, depth=4, num_heads=2, reducers=reducers).eval()
    images = torch.randn(1, 3, 64, 64)
    encoding = encoder(images)
    assert [block.mlp.longest for block in encoding.layouts] == [257, 65, 17, 17]

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(x).pooled

    assert float(image_cost(encoder, encoding.layouts).total) == counted_macs(Pooled(), images)


def test_off_the_grid_and_without_a_seed_it_says_so():
    tokens = Tokens.from_dense(torch.randn(2, 17, 8), num_prefix=1, grid=(4, 4), seed=torch.tensor([1, 2]))
    ragged = RandomBoundaries(8, compression=2).eval()(tokens, Evidence()).tokens
    with pytest.raises(ValueError, match="form a grid"):
        WindowedToMe(8)(ragged, Evidence(keys=torch.randn(len(ragged.features), 4)))
    unseeded = Tokens.from_dense(torch.randn(2, 16, 8), grid=(4, 4))
    with pytest.raises(ValueError, match=r"tokens\.seed"):
        WindowedToMe(8).train()(unseeded, Evidence(keys=torch.randn(32, 4)))


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 0}, {"matching": "all"}, {"by_size": False}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"expected|set it to False too"):
        WindowedToMe(8, **options)
