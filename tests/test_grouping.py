"""grouping.py, slots.py: pixels, prototypes and slots; two views are brought together."""

import itertools
import math

import pytest
import torch

from data import overlap_boxes
from grouping import GroupingNetwork, inverse_augmentation, overlapping, similarity
from slots import SlotPredictor, attentive_pooling, occupied
from trained import random

B, K, D, H, W = 3, 5, 7, 4, 6
PLACES = list(itertools.product(range(B), range(H), range(W)))


def test_the_similarity_is_the_cosine_of_every_prototype_and_every_pixel():
    embeddings, prototypes = random(B, D, H, W), random(K, D, seed=1)
    found = similarity(embeddings, prototypes)
    assert found.shape == (B, K, H, W)
    for (b, h, w), k in itertools.product(PLACES, range(K)):
        z, p = embeddings[b, :, h, w].tolist(), prototypes[k].tolist()
        dot = sum(x * y for x, y in zip(z, p))
        expected = dot / math.sqrt(sum(x * x for x in z) * sum(y * y for y in p))
        assert found[b, k, h, w].item() == pytest.approx(expected, rel=1e-12)


def sample(plane, y, x):
    """Bilinear, the border repeated beyond it."""
    h, w = plane.shape
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    upper = plane[top, left] + (x - left) * (plane[top, right] - plane[top, left])
    lower = plane[bottom, left] + (x - left) * (plane[bottom, right] - plane[bottom, left])
    return upper + (y - top) * (lower - upper)


def cut_slowly(maps, boxes, flipped):
    """One sample in the middle of each of h x w bins of the box."""
    out = torch.empty_like(maps)
    for (i, row, column), j in itertools.product(PLACES, range(K)):
        x1, y1, x2, y2 = boxes[i].tolist()
        y = y1 * H + (row + 0.5) * (y2 - y1) - 0.5  # pixel centers lie at half-integers
        x = x1 * W + (column + 0.5) * (x2 - x1) - 0.5
        out[i, j, row, W - 1 - column if flipped[i] else column] = sample(maps[i, j], y, x)
    return out


BOXES = torch.tensor([[0.1, 0.3, 0.75, 0.95], [0, 0, 1, 1], [0.4, 0, 1, 0.2]]).double()
FLIPPED = torch.tensor([True, False, True])


@pytest.mark.parametrize("flipped", [FLIPPED, ~FLIPPED])
def test_the_box_is_cut_by_bilinear_samples_and_mirrored_back(flipped):
    maps = random(B, K, H, W)
    found = inverse_augmentation(maps, BOXES, flipped)
    assert torch.allclose(found, cut_slowly(maps, BOXES, flipped), rtol=1e-9)


@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=2)))
def test_the_same_place_of_a_scene_comes_to_the_same_position_of_both_views(flips):
    """The scene is a slope, which bilinear sampling reproduces exactly away from the border."""
    h, w = 12, 15
    crops = [(10, 20, 60, 90), (25, 45, 80, 75)]  # top left height width; they share 45 x 65 px
    for crop, flip, box in zip(crops, flips, overlap_boxes(*crops, flips).double()):
        top, left, height, width = crop
        y = top + (torch.arange(h).double() + 0.5) / h * height
        x = left + (torch.arange(w).double() + 0.5) / w * width
        view = (y[:, None] + 3 * x).expand(1, 1, h, w)
        view = view.flip(3) if flip else view
        found = inverse_augmentation(view, box[None], torch.tensor([flip]))[0, 0]
        y, x = 25 + (torch.arange(h) + 0.5) / h * 45, 45 + (torch.arange(w) + 0.5) / w * 65
        expected = (y[:, None] + 3 * x).double()
        assert torch.allclose(found[1:-1, 1:-1], expected[1:-1, 1:-1], rtol=1e-5)


def test_an_empty_box_gives_finite_values_and_is_no_overlap():
    boxes = torch.stack([BOXES, torch.zeros(B, 4)], dim=1)
    found = inverse_augmentation(random(B, K, H, W), boxes[:, 1], FLIPPED)
    assert found.shape == (B, K, H, W) and found.isfinite().all()
    boxes[1] = torch.tensor([0.2, 0.5, 0.7, 0.5])
    assert overlapping(boxes).tolist() == [True, False, True]


def test_prototypes_start_from_a_standard_normal():
    table = GroupingNetwork("tiny", 400, dim_hidden=9, dim_out=50).prototypes.weight
    assert table.shape == (400, 50)
    assert table.mean().item() == pytest.approx(0, abs=0.05)
    assert table.std().item() == pytest.approx(1, rel=0.05)


def test_a_slot_is_the_mean_of_the_pixels_weighted_by_their_assignment():
    embeddings, maps = random(B, D, H, W, seed=1), random(B, K, H, W).tanh()
    expected = torch.zeros(B, K, D, dtype=torch.float64)
    for b, k in itertools.product(range(B), range(K)):
        total = 0.0
        for h, w in itertools.product(range(H), range(W)):
            weights = [math.exp(x / 0.3) for x in maps[b, :, h, w].tolist()]
            a = weights[k] / sum(weights) + 1e-6
            expected[b, k] += a * embeddings[b, :, h, w]
            total += a
        expected[b, k] /= total
    assert torch.allclose(attentive_pooling(embeddings, maps, 0.3), expected, rtol=1e-10)


def test_a_prototype_is_occupied_if_it_is_nearest_to_some_pixel():
    maps = random(B, 17, H, W)  # 17 prototypes for 24 pixels: some go empty
    found = occupied(maps.requires_grad_())
    assert found.shape == (B, 17) and found.dtype == torch.bool and not found.requires_grad
    for b in range(B):
        columns = [maps[b, :, h, w].tolist() for h in range(H) for w in range(W)]
        winners = {column.index(max(column)) for column in columns}
        assert found[b].nonzero().flatten().tolist() == sorted(winners)
    assert 0 < found.sum() < found.numel()


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_use_the_running_statistics_and_disturb_nothing(n):
    predictor = SlotPredictor(D, D, 9).double().train()
    predictor(random(8, D))  # gives it running statistics
    buffers = {name: value.clone() for name, value in predictor.named_buffers()}
    rows = random(n, D, seed=1).requires_grad_()
    found = predictor(rows)
    found.sum().backward()
    assert found.shape == (n, D)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())
    assert all(module.training for module in predictor.modules())
    assert all(value.equal(buffers[name]) for name, value in predictor.named_buffers())
    assert torch.allclose(found, predictor.eval()(rows))
