"""measures/retrieval.py: the best segments of every prototype."""

import math

import pytest
import torch

from measures import retrieval
from measures.retrieval import Retrieval, check_choice, choose_prototypes

K, H, W = 7, 4, 5


def naive_retrieval(similarity, top):
    """(scores, images) per prototype from the definition: sorted by score, then by image."""
    ranked = []
    for k in range(K):
        scores = []
        for b, maps in enumerate(similarity):
            owned = [(y, x) for y in range(H) for x in range(W) if maps[:, y, x].argmax() == k]
            if owned:
                scores.append((-sum(float(maps[k, y, x]) for y, x in owned) / len(owned), b))
        ranked.append([(-score, b) for score, b in sorted(scores)[:top]])
    return ranked


@pytest.mark.parametrize("batch", [1, 5, 13])
def test_streamed_retrieval_equals_the_naive_one_with_ties_and_unoccupied_prototypes(batch):
    # Coarse values: many pixels and many scores are equal
    similarity = torch.rand(13, K, H, W, generator=torch.Generator().manual_seed(3))
    similarity = (similarity * 8).round() / 4 - 1
    similarity[:, [4, 6]] = -1  # never the nearest
    similarity[9] = similarity[2]  # two images with the same scores
    similarity[5, 6, 1, 1] = 1.5  # occupied in one image only
    found = Retrieval(K, top=4)
    for indices in torch.arange(13).split(batch):
        found.add(indices, similarity[indices])
    assert found.seen == 13
    assert found.cells.tolist() == [int((similarity.argmax(1) == k).sum()) for k in range(K)]
    for k, expected in enumerate(naive_retrieval(similarity, 4)):
        missing = 4 - len(expected)
        assert found.images[k].tolist() == [b for _, b in expected] + [-1] * missing
        scores = [score for score, _ in expected] + [-math.inf] * missing
        assert found.scores[k].tolist() == pytest.approx(scores)
        assert found.active[k] == len(naive_retrieval(similarity, 13)[k])
    assert found.images[4].eq(-1).all() and found.images[6].tolist() == [5, -1, -1, -1]


def test_prototypes_are_chosen_by_use_by_extremes_or_by_number():
    active = torch.tensor([3, 0, 9, 9, 1, 2, 4, 5, 6, 7, 8, 2, 10])
    assert choose_prototypes(active, ["used"], 3) == [12, 2, 3]
    assert choose_prototypes(active, ["extremes"], 3) == [12, 2, 3, 10, 9, 6, 0, 5, 11, 4]
    assert choose_prototypes(active, ["7", "1"], 3) == [7, 1]
    for wrong in (["13"], ["all"], ["-1"], ["used", "3"]):
        with pytest.raises(ValueError, match=r"--show .*numbers from 0 to 12"):
            check_choice(wrong, 13)
    with pytest.raises(ValueError, match="no prototype is occupied"):
        choose_prototypes(torch.zeros(3), ["used"], 3)


def report_of(active, seen):
    found = Retrieval(len(active))
    found.active, found.seen = torch.tensor(active), seen
    return retrieval.slot_report(found)


def test_the_report_names_the_most_and_the_least_active_of_the_slots_in_use():
    active = [3, 0, 9, 9, 1, 2, 4, 0]
    report = report_of(active, 10)
    assert [each["prototype"] for each in report["top"]] == [2, 3, 6, 0, 5]
    assert report["bottom"] == [dict(prototype=4, images=1)]  # none that is in top
    numbers = dict(prototypes_used=6, images=10, occupied_per_image=2.8, active=active)
    assert numbers.items() <= report.items()
    text = retrieval.format_slots(report)
    assert "2.80 slots" in text and "6 of 8" in text and "prototypes 4 (1)" in text
    assert "least often" not in retrieval.format_slots(report_of([3, 0, 9], 9))
    many = report_of(list(range(14)), 13)
    assert [each["prototype"] for each in many["bottom"]] == [1, 2, 3, 4, 5]
