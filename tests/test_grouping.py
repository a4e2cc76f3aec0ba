"""grouping.py, slots.py: two views are brought together; what a formula does not say.

The formulas stand in test_slotcon.py once more, written slowly.
"""

import itertools

import pytest
import torch

from data import overlap_boxes
from grouping import GroupingNetwork, inverse_augmentation, overlapping
from slots import SlotPredictor
from trained import random

B, K, D, H, W = 3, 5, 7, 4, 6


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
    boxes = torch.tensor([[0.1, 0.3, 0.75, 0.95], [0, 0, 0, 0], [0.2, 0.5, 0.7, 0.5]])
    found = inverse_augmentation(random(B, K, H, W), boxes, torch.tensor([True, False, True]))
    assert found.shape == (B, K, H, W) and found.isfinite().all()
    assert overlapping(boxes[:, None]).tolist() == [True, False, False]


def test_prototypes_start_from_a_standard_normal():
    table = GroupingNetwork("tiny", 400, dim_hidden=9, dim_out=50).prototypes.weight
    assert table.shape == (400, 50) and table.mean().item() == pytest.approx(0, abs=0.05)
    assert table.std().item() == pytest.approx(1, rel=0.05)


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
