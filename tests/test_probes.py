"""measures/probes.py: what frozen features know of classes."""

import pytest
import torch

from measures import probes
from measures.layouts import IGNORE
from trained import NAMES, colored


def pooled(side):
    """A backbone that averages squares of pixels."""
    backbone = torch.nn.AvgPool2d(side)
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    return backbone


def test_cells_have_the_shares_of_the_classes_they_cover():
    # Two cells: 3/4 class 0 and 1/4 class 2; all class 1
    label = torch.tensor([[[0, 0, 1, 1], [0, 2, IGNORE, IGNORE]]])
    batches = [(None, (torch.zeros(1, 3, 2, 4), label))]
    features, shares = probes.collect_cells(pooled(2), batches, 1, 3)
    assert features.shape == (2, 3)
    assert sorted(shares.tolist()) == [[0.0, 1.0, 0.0], [0.75, 0.0, 0.25]]


def test_cells_without_a_label_are_dropped_and_a_bounded_number_comes_from_every_image():
    images = torch.arange(6).repeat_interleave(3 * 8 * 8).reshape(6, 3, 8, 8).to(torch.uint8)
    label = torch.full((6, 8, 8), IGNORE)
    label[:, :4] = 1
    batches = [(None, (images, label))]
    assert len(probes.collect_cells(pooled(2), batches, 6, 3)[0]) == 6 * 8
    batches = [(None, (some, torch.ones(3, 8, 8, dtype=torch.long))) for some in images.split(3)]
    features, _ = probes.collect_cells(pooled(2), batches, 6, 3, most=12)
    assert len(features) == 12 and len(features[:, 0].unique()) == 6


@pytest.mark.parametrize("scale, shift", [(1, 0), (1000, 50)])
def test_the_linear_probe_learns_what_is_linear_whatever_the_scale_of_the_features(scale, shift):
    features = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    classes, scaled = features[:, 1:].argmax(1), features * scale + shift
    shares = torch.nn.functional.one_hot(classes, 3).float()
    scores = probes.linear_probe(scaled, shares)(scaled.T[None, :, :, None])  # (1 4 300 1)
    assert scores.shape == (1, 3, 300, 1)
    assert (scores[0, :, :, 0].argmax(0) == classes).float().mean() > 0.95


def test_a_neighbor_votes_with_its_classes_and_the_nearer_the_more():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])
    maps = torch.tensor([[2.0, 0.1], [0.1, 3.0]]).T.reshape(1, 2, 1, 2)
    scores = probes.neighbor_probe(features, shares)(maps)[0, :, 0]  # (t, w)
    assert scores[:, 0].tolist() == pytest.approx([1, 0], abs=1e-3)
    assert scores[:, 1].tolist() == pytest.approx([0.25, 0.75], abs=1e-3)
    between = torch.tensor([1.0, 1.1]).reshape(1, 2, 1, 1)  # the directions count, not the lengths
    classify = probes.neighbor_probe(features * torch.tensor([[1.0], [9.0], [5.0]]), shares)
    assert classify(between).equal(classify(between * 8)) and 0.3 < classify(between)[0, 0] < 0.9


def test_both_probes_are_tested_on_images_they_have_not_learned_from():
    learned, tested = colored(seed=1), colored(seed=2)
    backbone = pooled(1)  # the color of a pixel is its class
    report = probes.probe(backbone, [(None, learned)], 5, [(None, tested)], NAMES)
    for kind in ("linear", "neighbors"):
        assert report[kind]["miou"] == report[kind]["accuracy"] == report[kind]["iou"]["red"] == 1
    turned = tested[0], (tested[1] + 1) % 3
    report = probes.probe(backbone, [(None, learned)], 5, [(None, turned)], NAMES)
    # Nothing is matched.
    assert report["linear"]["accuracy"] == report["neighbors"]["accuracy"] == 0
    assert report["not_learned"] == []
    without = learned[0], torch.where(learned[1] == 1, IGNORE, learned[1])
    report = probes.probe(backbone, [(None, without)], 5, [(None, tested)], NAMES)
    assert report["not_learned"] == [NAMES[1]]


def test_probes_refuse_to_learn_from_or_to_be_tested_on_nothing():
    images, label = colored()
    known, empty = [(None, (images, label))], [(None, (images, torch.full_like(label, IGNORE)))]
    with pytest.raises(ValueError, match="nothing is labeled: all pixels of the 5 labels to learn"):
        probes.probe(pooled(1), empty, 5, known, NAMES)
    with pytest.raises(ValueError, match="nothing is labeled: all pixels of the labels to test on"):
        probes.probe(pooled(1), known, 5, empty, NAMES)
