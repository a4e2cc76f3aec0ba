"""measures/metrics.py: scores of groups against classes."""

import pytest
import torch

from measures import metrics


def test_ignored_pixels_are_not_counted_and_unequal_axes_keep_their_places():
    predicted = torch.tensor([[0, 2, 2], [1, 1, 0]])
    target = torch.tensor([[3, 3, metrics.IGNORE], [0, metrics.IGNORE, 3]], dtype=torch.uint8)
    expected = torch.tensor([[0, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert metrics.confusion_matrix(predicted, target, 3, 4).equal(expected)
    large, class_of = torch.tensor([[200], [26]], dtype=torch.uint8)  # 200 * 27 overflows 8 bits
    assert metrics.confusion_matrix(large, class_of, 201, 27)[200, 26] == 1


@pytest.mark.parametrize("rows, one, many, accuracy, mean_iou, shared, rand", [
    ([[0, 0, 9], [0, 4, 0], [5, 0, 0], [0, 0, 0]], [2, 1, 0, -1], [2, 1, 0, -1], 1, 1, 1, 1),
    ([[0, 0, 0], [50, 30, 20]], [1, 0], [-1, 0], 0.5, 0.5 / 3, 0, 0),  # one group of all pixels
    ([[5, 1], [4, 0], [0, 7]], [0, -1, 1], [0, 0, 1], 12 / 17, (5 / 10 + 7 / 8) / 2, 0.603, 0.519),
    ([[0, 0]], [0], [-1], 0, 0, 0, 1),  # no labeled pixel
    ([[10**6, 0], [0, 10**6]], [0, 1], [0, 1], 1, 1, 1, 1),  # more pairs than float32 can count
])  # fmt: skip
def test_scores_of_small_tables(rows, one, many, accuracy, mean_iou, shared, rand):
    table = torch.tensor(rows)
    classes = metrics.match(table)
    assert (classes.tolist(), metrics.majority(table).tolist()) == (one, many)
    found = metrics.pixel_accuracy(table, classes), metrics.miou(table, classes), metrics.nmi(table)
    assert found == pytest.approx((accuracy, mean_iou, shared), abs=1e-3)
    assert metrics.adjusted_rand_index(table) == pytest.approx(rand, abs=1e-3)


def test_a_classifier_is_scored_by_the_names_it_gives_and_an_absent_class_is_none():
    report = metrics.known_scores(torch.tensor([[0, 6, 0], [2, 2, 0], [0, 0, 0]]), ("a", "b", "c"))
    assert report["iou"] == {"a": 0, "b": pytest.approx(0.2), "c": None}  # b: tp 2, fp 2, fn 6
    assert (report["miou"], report["accuracy"]) == pytest.approx((0.1, 0.2))


def test_the_rand_index_is_the_mean_over_scenes_of_the_pixels_that_count():
    torch.manual_seed(0)
    groups, truth = torch.randint(2, (3, 6, 7)), torch.randint(2, (3, 6, 7)).byte()
    counted = torch.rand(3, 6, 7) > 0.5
    counted[1] = False
    each = []
    for i in (0, 2):
        one, other = groups[i][counted[i]], truth[i][counted[i]]
        each.append(metrics.adjusted_rand_index(metrics.confusion_matrix(one, other, 2, 2)))
    assert metrics.rand_index(groups, truth, counted) == pytest.approx(sum(each) / 2)
    assert metrics.rand_index(truth.long(), truth) == 1
