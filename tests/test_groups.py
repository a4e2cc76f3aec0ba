"""measures/groups.py, networks.py: segments of a network, groups by color, both against labels."""

import json

import pytest
import torch
import torch.nn.functional as F

from grouping import GroupingNetwork
from measures import groups
from measures.groups import Tally, compare_in_memory, rgb_kmeans, sample_pixels
from measures.layouts import IGNORE
from measures.networks import untrained_backbone, untrained_network
from photometric import normalize
from staged import difference
from trained import NAMES, ByColor, K, colored


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_winner_is_the_largest_enlarged_map_whatever_the_chunk(chunk):
    maps = torch.rand(3, 7, 4, 5) * 2 - 1
    enlarged = F.interpolate(maps, (22, 31), mode="bilinear", align_corners=False)
    assert groups.winner(maps, (22, 31), chunk).equal(enlarged.argmax(1))
    ties = torch.zeros(1, 7, 2, 2)
    assert groups.winner(ties, (3, 3), chunk).eq(0).all()  # the lower one, across chunks too


def test_segments_and_occupied_slots_come_from_the_same_similarities():
    network = GroupingNetwork("tiny", 7, 12, 6).eval()
    images = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8)
    found, owned = groups.segment(network, images)
    _, similarity = network(normalize(images))
    for b in range(2):
        assert owned[b].nonzero().flatten().tolist() == similarity[b].argmax(0).unique().tolist()
    assert owned.shape == (2, 7) and found.equal(groups.winner(similarity, (32, 40)))


@pytest.mark.parametrize("num_groups", [9, 2000])
def test_color_groups_survive_more_centers_than_colors_or_pixels(num_groups):
    images, label = colored()
    segments, present = rgb_kmeans(sample_pixels(images.split(2)), num_groups)(images)
    assert present.shape == (5, num_groups) and present.sum(1).eq(3).all()
    assert all(len(segments[label == c].unique()) == 1 for c in range(3))


def test_pixels_are_sampled_from_every_image_whatever_the_batch():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 5, 6)
    one, other = (sample_pixels(images.split(size), per_image=8) for size in (3, 1))
    assert one.equal(other) and one[:, 0].bincount().tolist() == [8, 8, 8, 8]


def test_a_network_that_understands_scores_one_and_a_blind_one_the_largest_class():
    images, label = colored()
    report = compare_in_memory(ByColor(), ByColor(sighted=False), images, label, (*NAMES, "none"))
    for numbers in (report, report["rgb_kmeans"]):  # here color is all there is to know
        for key in ("nmi", "miou", "accuracy", "miou_many_to_one", "accuracy_many_to_one"):
            assert numbers[key] == pytest.approx(1)
    largest = float(label.flatten().bincount().max() / label.numel())
    blind = report["untrained"]
    assert blind["accuracy"] == pytest.approx(largest) and blind["nmi"] == 0
    assert blind["miou"] == pytest.approx(largest / 3) and blind["prototypes_used"] == 1
    assert report["matching"] == {"red": 4, "green": 3, "blue": 2, "none": 0}
    assert report["iou"] == {"red": 1, "green": 1, "blue": 1, "none": None}
    assert report["occupied_per_image"] == 3 == report["prototypes_used"]
    json.dumps(report, allow_nan=False)
    text = groups.format_table(report)
    for words in ("trained", "untrained network", "k-means on RGB", "mIoU", "one-to-one"):
        assert words in text


def test_one_to_one_and_many_to_one_are_kept_apart():
    tally = Tally(K, ("a", "b"))
    segments = torch.tensor([[[0, 0, 0, 1, 1, 3]]])  # class a is split between prototypes 0 and 1
    tally.add(segments, torch.ones(1, K, dtype=torch.bool), torch.tensor([[[0, 0, 0, 0, 0, 1]]]))
    report = tally.report()
    assert (report["miou"], report["accuracy"]) == pytest.approx(((3 / 5 + 1) / 2, 4 / 6))
    assert report["miou_many_to_one"] == report["accuracy_many_to_one"] == 1
    assert report["iou"] == pytest.approx({"a": 3 / 5, "b": 1})
    assert report["matching"] == {"a": 0, "b": 3}


def test_the_rand_index_of_segments_without_names_is_a_mean_over_labeled_images():
    tally, owned = Tally(3, ()), torch.ones(2, 3, dtype=torch.bool)
    truth = torch.tensor([[[7, 7, 9, 9]], [[0, 0, 4, 4]]])
    # Each is perfect on its own, together they are a contradiction
    tally.add(torch.tensor([[[2, 2, 0, 0]], [[0, 0, 2, 2]]]), owned, truth)
    assert tally.report()["adjusted_rand_index"] == 1
    tally.add(torch.zeros(2, 1, 4, dtype=torch.long), owned, truth)
    assert tally.report()["adjusted_rand_index"] == pytest.approx(0.5)
    tally.add(torch.zeros(2, 1, 4, dtype=torch.long), owned, torch.full_like(truth, IGNORE))
    assert tally.report()["adjusted_rand_index"] == pytest.approx(0.5) and tally.images == 6


def test_the_untrained_network_depends_on_the_seed_alone_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sizes = dict(arch="tiny", num_prototypes=K, dim_hidden=12, dim_out=6)
    network = untrained_network(sizes, seed=3)
    assert torch.rand(1) == expected and not network.training
    assert network.prototypes.weight.shape == (K, 6)
    again = untrained_network(sizes, seed=3)
    assert not difference(again.state_dict(), network.state_dict())
    same, other = (untrained_backbone("tiny", seed=seed).state_dict() for seed in (3, 4))
    assert not difference(same, network.backbone.state_dict()) and difference(same, other)
