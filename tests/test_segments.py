"""segments.py: what a trained network makes of images, and the best segments of every prototype."""


import pytest
import torch
import torch.nn.functional as F

from grouping import GroupingNetwork
from measures import segments
from photometric import normalize

B, K, H, W = 3, 7, 4, 5


def random_maps(b=B, k=K, seed=0):
    return torch.rand(b, k, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_winner_is_the_largest_enlarged_map_whatever_the_chunk(chunk):
    maps = random_maps()
    enlarged = F.interpolate(maps, (22, 31), mode="bilinear", align_corners=False)
    assert segments.winner(maps, (22, 31), chunk).equal(enlarged.argmax(1))


def test_maps_are_enlarged_before_the_decision_and_not_after():
    maps = torch.tensor(
        [[[[0.0, 1.0]], [[0.9, 0.0]]]]
    )  # 1 at the left, 0 at the right; they cross right of the middle
    found = segments.winner(maps, (1, 200))[0, 0]
    assert found[:97].eq(1).all() and found[99:].eq(0).all()
    nearest = F.interpolate(maps.argmax(1, keepdim=True).float(), (1, 200))[0, 0, 0]
    assert not found.equal(nearest.long())


def test_at_a_tie_the_lower_prototype_wins_across_chunks():
    maps = torch.zeros(1, 5, 2, 2)
    assert segments.winner(maps, (3, 3), chunk=2).eq(0).all()


def test_segments_and_occupied_slots_come_from_the_same_similarities():
    torch.manual_seed(0)
    network = GroupingNetwork("tiny", K, 12, 6).eval()
    images = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8)
    found, owned = segments.segment(network, images)
    assert found.shape == (2, 32, 40) and owned.shape == (2, K) and not found.is_inference()
    _, similarity = network(normalize(images))
    for b in range(2):
        assert owned[b].nonzero().flatten().tolist() == similarity[b].argmax(0).unique().tolist()
    assert found.equal(segments.winner(similarity, (32, 40)))
