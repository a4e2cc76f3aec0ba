"""measures/grouping_report.py and color_groups.py: groups against labels, beside two baselines."""

import json

import pytest
import torch
from trained import NAMES, ByColor, K, colored

from grouping import GroupingNetwork
from measures.color_groups import rgb_kmeans, sample_pixels
from measures.grouping_report import Tally, compare_in_memory, format_classes, format_table
from measures.metrics import IGNORE


def test_a_network_that_understands_scores_one_and_a_blind_one_the_largest_class():
    images, label = colored()
    report = compare_in_memory(ByColor(), ByColor(sighted=False), images, label, class_names=NAMES)
    for numbers in (report, report["rgb_kmeans"]):  # here color is all there is to know
        for key in ("nmi", "miou", "accuracy", "miou_many_to_one", "accuracy_many_to_one"):
            assert numbers[key] == pytest.approx(1)
    largest = label.flatten().bincount().max() / label.numel()
    assert report["untrained"]["accuracy"] == pytest.approx(float(largest))
    assert report["untrained"]["miou"] == pytest.approx(float(largest) / 3)
    assert report["untrained"]["nmi"] == 0 and report["untrained"]["prototypes_used"] == 1
    assert report["matching"] == {"red": 4, "green": 3, "blue": 2} and report["iou"]["red"] == 1
    assert report["occupied_per_image"] == 3 and report["prototypes_used"] == 3


def test_a_report_has_the_keys_of_result_json_for_every_method():
    report = compare_in_memory(ByColor(), ByColor(sighted=False), *colored(), class_names=NAMES)
    keys = {"nmi", "miou", "miou_many_to_one", "accuracy", "occupied_per_image", "prototypes_used"}
    for numbers in (report, report["untrained"], report["rgb_kmeans"]):
        assert keys <= numbers.keys()
    json.dumps(report, allow_nan=False)
    table = format_table(report)
    for text in ("trained", "untrained network", "k-means on RGB", "mIoU", "one-to-one"):
        assert text in table


def test_one_to_one_and_many_to_one_are_kept_apart():
    tally = Tally(K, ("a", "b"))
    segments = torch.tensor([[[0, 0, 0, 1, 1, 3]]])  # class a is split between prototypes 0 and 1
    tally.add(segments, torch.ones(1, K, dtype=torch.bool), torch.tensor([[[0, 0, 0, 0, 0, 1]]]))
    report = tally.report()
    assert (report["miou"], report["accuracy"]) == pytest.approx(((3 / 5 + 1) / 2, 4 / 6))
    assert report["miou_many_to_one"] == report["accuracy_many_to_one"] == 1
    assert report["iou"] == pytest.approx({"a": 3 / 5, "b": 1}) and report["matching"] == {
        "a": 0,
        "b": 3,
    }


def test_a_class_without_a_pixel_is_none_in_json_and_not_nan():
    images, label = colored()
    report = compare_in_memory(ByColor(), ByColor(), images, label, class_names=(*NAMES, "absent"))
    assert report["iou"]["absent"] is None and report["miou"] == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_the_report_does_not_depend_on_the_batch_size(batch_size):
    torch.manual_seed(0)
    networks = [GroupingNetwork("tiny", K, 12, 6).double().eval() for _ in range(2)]
    networks = [Double(each) for each in networks]
    images, label = colored(7, 32, 36)
    one = compare_in_memory(*networks, images, label, class_names=NAMES, batch_size=batch_size)
    all_at_once = compare_in_memory(*networks, images, label, class_names=NAMES, batch_size=100)
    for key in ("nmi", "miou", "accuracy", "occupied_per_image"):
        assert one[key] == pytest.approx(all_at_once[key])
        assert one["rgb_kmeans"][key] == pytest.approx(all_at_once["rgb_kmeans"][key])


class Double(torch.nn.Module):
    """In float64: in float32, ties between prototypes depend on the size of the batch."""

    def __init__(self, network):
        super().__init__()
        self.network, self.prototypes = network, network.prototypes

    def forward(self, images):
        return self.network(images.double())


def test_the_rand_index_of_segments_without_names_is_a_mean_over_images():
    tally = Tally(3, ())
    truth = torch.tensor([[[7, 7, 9, 9]], [[0, 0, 4, 4]]])
    segments = torch.tensor(
        [[[2, 2, 0, 0]], [[0, 0, 2, 2]]]
    )  # each perfect on its own, contradictory together
    tally.add(segments, torch.ones(2, 3, dtype=torch.bool), truth)
    assert tally.report()["adjusted_rand_index"] == 1
    tally.add(torch.zeros(2, 1, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool), truth)
    assert tally.report()["adjusted_rand_index"] == pytest.approx(0.5)


@pytest.mark.parametrize("num_groups", [9, 2000])
def test_kmeans_finds_three_colors_and_survives_more_centers_than_colors_or_pixels(num_groups):
    images, label = colored()
    segmenter = rgb_kmeans(sample_pixels(images.split(2)), num_groups)
    segments, present = segmenter(images)
    assert present.shape == (5, num_groups) and present.sum(1).eq(3).all()
    for c in range(3):
        assert len(segments[label == c].unique()) == 1


def test_pixels_are_sampled_from_every_image_and_the_same_each_time():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 5, 6)
    pixels = sample_pixels(images.split(3), per_image=8)
    assert pixels[:, 0].bincount().tolist() == [8, 8, 8, 8]
    assert pixels.equal(sample_pixels(images.split(1), per_image=8))


def test_an_image_without_a_label_changes_no_mean():
    tally = Tally(3, ())
    truth = torch.tensor([[[7, 7, 9, 9]], [[IGNORE] * 4]])
    mixed = torch.tensor([[[2, 0, 2, 0]], [[0, 0, 2, 2]]])
    tally.add(mixed[:1], torch.ones(1, 3, dtype=torch.bool), truth[:1])
    alone = tally.report()["adjusted_rand_index"]
    tally.add(mixed[1:], torch.ones(1, 3, dtype=torch.bool), truth[1:])
    assert tally.report()["adjusted_rand_index"] == alone < 1 and tally.images == 2


@pytest.mark.parametrize("class_names", [("a", "b"), ()])
def test_nothing_labeled_is_refused_and_not_scored(class_names):
    tally = Tally(3, class_names)
    label = torch.full((2, 1, 4), IGNORE)
    tally.add(torch.zeros(2, 1, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool), label)
    with pytest.raises(ValueError, match="nothing is labeled: all pixels of the 2 labels are 255"):
        tally.report()


def test_the_headings_of_a_table_stand_over_their_numbers_however_long_they_are():
    numbers = dict(adjusted_rand_index=0.25, occupied_per_image=3.0, prototypes_used=4)
    report = dict(numbers, untrained=numbers, rgb_kmeans=numbers)
    heading, *rows = format_table(report).splitlines()
    assert "adjusted Rand" in heading and len(rows) == 3
    assert {len(row) for row in rows} == {len(heading)}


def test_absent_classes_share_one_line():
    report = dict(iou={"a": 0.5, **{f"class {t}": None for t in range(9)}})
    assert format_classes(report).splitlines() == [
        f"  {'a':<18}0.500",
        "  without a pixel: class 0, class 1, class 2, class 3, class 4, class 5 and 3 more"]
    assert format_classes(dict(adjusted_rand_index=0.5)) == ""
