"""measures/retrieval.py: the best segments of every prototype."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from measures import retrieval
from measures.retrieval import choose_prototypes

ROOT = Path(__file__).parent.parent
B, K, H, W = 3, 7, 4, 5


def random_maps(b=B, k=K, seed=0):
    return torch.rand(b, k, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def naive_retrieval(similarity, top):
    """(scores, images) per prototype from the definition: sorted by score, then by image."""
    ranked = []
    for k in range(similarity.shape[1]):
        scores = []
        for b, maps in enumerate(similarity):
            owned = [(y, x) for y in range(H) for x in range(W) if maps[:, y, x].argmax() == k]
            if owned:
                scores.append((-sum(float(maps[k, y, x]) for y, x in owned) / len(owned), b))
        ranked.append([(-score, b) for score, b in sorted(scores)[:top]])
    return ranked


@pytest.mark.parametrize("batch", [1, 2, 5, 13])
def test_streamed_retrieval_equals_the_naive_one_with_ties_and_unoccupied_prototypes(batch):
    similarity = (
        random_maps(13, seed=3).mul(4).round() / 4
    )  # coarse values: many pixels and many scores are equal
    similarity[:, 4] = -1  # never the nearest
    similarity[9] = similarity[2]  # two images with the same scores
    similarity[:, 6] = -1
    similarity[5, 6, 1, 1] = 1.5  # occupied in one image only
    found = retrieval.Retrieval(K, top=4)
    for indices in torch.arange(13).split(batch):
        found.add(indices, similarity[indices])
    for k, expected in enumerate(naive_retrieval(similarity, 4)):
        images, scores = found.images[k].tolist(), found.scores[k].tolist()
        assert images == [b for _, b in expected] + [-1] * (4 - len(expected))
        assert scores == pytest.approx(
            [score for score, _ in expected] + [-math.inf] * (4 - len(expected))
        )
        assert found.active[k] == len(naive_retrieval(similarity, 13)[k])
    assert found.images[4].eq(-1).all() and found.images[6].tolist() == [5, -1, -1, -1]


def test_a_image_in_which_a_prototype_owns_no_pixel_is_never_retrieved_for_it():
    similarity = torch.tensor(
        [[[[0.9]], [[0.8]]], [[[0.1]], [[0.2]]]]
    )  # prototype 1: second in image 0, owner in 1
    found = retrieval.Retrieval(2, top=2)
    found.add(torch.arange(2), similarity)
    assert found.images.tolist() == [
        [0, -1],
        [1, -1],
    ]  # by similarity alone, image 0 would be the best for both


def test_the_score_of_a_segment_is_the_mean_over_its_own_pixels():
    similarity = torch.tensor([[[[0.5, 0.7, 0.1]], [[0.2, 0.1, 0.4]], [[0.0, 0.0, 0.0]]]])
    assert retrieval.segment_scores(similarity)[0].tolist() == pytest.approx([0.6, 0.4, -math.inf])


MEMORY = """
    import resource, torch
    from measures.retrieval import Retrieval
    torch.set_num_threads(1)
    found, generator = Retrieval(2048, 5), torch.Generator().manual_seed(0)
    for indices in torch.arange(5000).split(16):
        found.add(indices, torch.rand(len(indices), 2048, 7, 7, generator=generator))
    assert (found.active > 0).all() and found.scores.isfinite().all()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_retrieval_over_5000_images_with_2048_prototypes_stays_under_2_gb():
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 2000  # MB, the whole process


def test_prototypes_are_chosen_by_use_by_extremes_or_by_number():
    active = torch.tensor([3, 0, 9, 9, 1, 2, 4, 5, 6, 7, 8, 2, 10])
    choose = choose_prototypes
    assert choose(active, ["used"], 3) == [12, 2, 3]
    assert choose(active, ["all"], 3) == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert choose(active, ["extremes"], 3) == [12, 2, 3, 10, 9, 6, 0, 5, 11, 4]
    assert choose(active, ["7", "1"], 3) == [7, 1]
    for wrong in (["13"], ["best"], ["-1"], ["used", "3"]):
        with pytest.raises(ValueError, match=r"--show .*numbers from 0 to 12"):
            choose(active, wrong, 3)
