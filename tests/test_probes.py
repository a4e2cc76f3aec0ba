"""measures/probes.py: what frozen features know of classes."""

import pytest
import torch
from trained import NAMES, colored

from measures import probes
from measures.metrics import IGNORE


def test_cells_carry_the_shares_of_the_classes_they_cover():
    label = torch.tensor(
        [[[0, 0, 1, 1], [0, 2, IGNORE, IGNORE]]]
    )  # two cells: 3/4 class 0 + 1/4 class 2, all class 1
    backbone = torch.nn.AvgPool2d(2)
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    features, shares = probes.collect_cells(
        backbone, [(None, (torch.zeros(1, 3, 2, 4), label))], 1, 3
    )
    assert features.shape == (2, 3)
    assert sorted(shares.tolist()) == [[0.0, 1.0, 0.0], [0.75, 0.0, 0.25]]


def test_cells_without_a_label_are_dropped_and_memory_is_bounded_with_every_image_heard():
    backbone = torch.nn.AvgPool2d(2)
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    images = torch.arange(6).repeat_interleave(3 * 8 * 8).reshape(6, 3, 8, 8).to(torch.uint8)
    label = torch.full((6, 8, 8), IGNORE)
    label[:, :4] = 1
    batches = [(None, (images[:3], label[:3])), (None, (images[3:], label[3:]))]
    assert len(probes.collect_cells(backbone, batches, 6, 3)[0]) == 6 * 8
    batches = [(None, (some, torch.ones(3, 8, 8, dtype=torch.long))) for some in images.split(3)]
    features, _ = probes.collect_cells(backbone, batches, 6, 3, most=12)
    assert len(features) == 12 and len(features[:, 0].unique()) == 6
    assert len(probes.collect_cells(backbone, batches, 6, 3, most=2)[0]) == 2


def test_the_linear_probe_learns_what_is_linear_whatever_the_scale_of_the_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 4, generator=generator)
    classes = features[:, 1:].argmax(1)
    shares = torch.nn.functional.one_hot(classes, 3).float()
    for scale, shift in ((1, 0), (1000, 50)):
        classify = probes.linear_probe(features * scale + shift, shares)
        maps = (features * scale + shift)[None, :, :, None].transpose(
            1, 2
        )  # (b c h w) = (1, 4, 300, 1)
        accuracy = (classify(maps)[0, :, :, 0].argmax(0) == classes).float().mean()
        assert classify(maps).shape == (1, 3, 300, 1) and accuracy > 0.95


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


def test_a_probe_is_scored_by_the_names_it_gives():
    images, label = colored()
    backbone = torch.nn.Identity()  # its largest channel is the class
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    classifiers = dict(right=lambda maps: maps, turned=lambda maps: maps.roll(1, dims=1))
    report = probes.score_probes(backbone, classifiers, [(None, (images, label))], NAMES)
    assert (
        report["right"]["miou"] == report["right"]["accuracy"] == 1
        and report["right"]["iou"]["green"] == 1
    )
    assert report["turned"]["miou"] == report["turned"]["accuracy"] == 0


def test_probes_refuse_to_learn_from_or_to_be_tested_on_nothing():
    backbone = torch.nn.AvgPool2d(2)
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    empty = [(None, (torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), IGNORE)))]
    with pytest.raises(ValueError, match="nothing is labeled: all pixels of the 2 labels to learn"):
        probes.collect_cells(backbone, empty, 2, 3)
    with pytest.raises(ValueError, match="nothing is labeled: all pixels of the labels to test on"):
        probes.score_probes(backbone, dict(linear=lambda maps: maps), empty, NAMES)


class Listed:
    """As much of a labeled data set as `pick_at_random` needs."""

    def __init__(self, indices):
        self.indices = list(indices)

    def __len__(self):
        return len(self.indices)

    def subset(self, indices):
        return Listed(self.indices[i] for i in indices)


def test_random_images_keep_their_order_and_are_the_same_each_time():
    whole = Listed(range(40))
    some = probes.pick_at_random(whole, 7).indices
    assert len(set(some)) == 7 and some == sorted(some) and some != list(range(7))
    assert some == probes.pick_at_random(whole, 7).indices
    assert probes.pick_at_random(whole, 0) is whole and len(probes.pick_at_random(whole, 99)) == 40
