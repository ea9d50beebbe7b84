"""Token merging brought to a given cost."""

import pytest
import torch

from dtpvit.encoder import VisionEncoder
from dtpvit.encoder.reducers import ToMe
from dtpvit.evaluation.cost import dense_macs, image_macs
from dtpvit.evaluation.equal_cost import merge_to_cost


@pytest.mark.parametrize("share", [2.0, 1.0, 0.8, 0.5, 0.1])
def test_the_count_is_the_nearest_of_all(share):
    reducers = {block: ToMe(24, r=1) for block in range(4)}
    encoder = VisionEncoder(image_size=64, patch_size=8, dim=24, depth=4, num_heads=2, reducers=reducers).eval()
    wanted = share * dense_macs(encoder, 7)
    found = merge_to_cost(encoder, wanted, 7)
    assert {reducer.r for reducer in encoder.reducers.values()} == {found}

    def distance(r):
        for reducer in encoder.reducers.values():
            reducer.r = r
        return abs(float(image_macs(encoder, encoder(torch.zeros(1, 3, 64, 64)), 7)) - wanted)

    assert distance(found) == min(map(distance, range(33)))
