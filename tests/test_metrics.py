"""metrics.py: scores of groups against classes."""

from itertools import permutations

import pytest
import torch

from measures.metrics import (
    IGNORE,
    UNMATCHED,
    adjusted_rand_index,
    confusion_matrix,
    iou,
    majority,
    match,
    miou,
    nmi,
    pixel_accuracy,
)


def random_confusion(num_predicted, num_classes, seed, empty_class=None):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 50, (num_predicted, num_classes), generator=generator)
    if empty_class is not None:
        counts[:, empty_class] = 0
    return counts


def one_to_one_namings(num_predicted, num_classes):
    """Every assignment of min(k, t) different classes to prototypes; UNMATCHED for the rest."""
    padded = list(range(num_classes)) + [UNMATCHED] * max(num_predicted - num_classes, 0)
    return {tuple(p[:num_predicted]) for p in permutations(padded)}


def scores_by_hand(confusion, naming):
    """(right pixels, mean IoU), pixel by pixel from the definition."""
    k, t = confusion.shape
    right, ious = 0, []
    for c in range(t):
        tp = sum(int(confusion[p, c]) for p in range(k) if naming[p] == c)
        fp = sum(
            int(confusion[p, o]) for p in range(k) for o in range(t) if naming[p] == c and o != c
        )
        fn = sum(int(confusion[p, c]) for p in range(k) if naming[p] != c)
        right += tp
        if tp + fn:  # classes that occur
            ious.append(tp / (tp + fp + fn))
    return right, sum(ious) / len(ious)


@pytest.mark.parametrize(
    "num_predicted, num_classes, empty_class",
    [(1, 1, None), (2, 3, None), (4, 4, 2), (7, 7, None), (3, 7, 5), (7, 4, None), (6, 5, 0)],
)
def test_matching_and_scores_equal_a_search_over_all_permutations(
    num_predicted, num_classes, empty_class
):
    for seed in range(
        1 if num_predicted * num_classes > 40 else 3
    ):  # 7! namings take a second each
        confusion = random_confusion(num_predicted, num_classes, seed, empty_class)
        found = match(confusion)
        right, mean_iou = scores_by_hand(confusion, found.tolist())
        best = max(
            scores_by_hand(confusion, n)[0] for n in one_to_one_namings(num_predicted, num_classes)
        )
        assert right == best
        assert pixel_accuracy(confusion, found) == pytest.approx(best / int(confusion.sum()))
        assert miou(confusion, found) == pytest.approx(mean_iou)


def test_a_matching_names_no_class_twice_and_leaves_surplus_prototypes_unnamed():
    classes = match(random_confusion(7, 4, seed=1))
    assert sorted(classes.tolist()) == [UNMATCHED] * 3 + [0, 1, 2, 3]


def test_ignored_pixels_are_not_counted_and_unequal_axes_keep_their_places():
    predicted = torch.tensor([[0, 2, 2], [1, 1, 0]])
    target = torch.tensor([[3, 3, IGNORE], [0, IGNORE, 3]], dtype=torch.uint8)
    expected = torch.tensor([[0, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert confusion_matrix(predicted, target, 3, 4).equal(expected)


def test_ids_of_large_tables_do_not_overflow_eight_bits():
    predicted, target = torch.tensor([[200], [26]], dtype=torch.uint8)
    confusion = confusion_matrix(predicted, target, 201, 27)
    assert confusion[200, 26] == 1 and confusion.sum() == 1


def test_the_table_does_not_depend_on_how_the_images_are_split():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 5, (11, 6, 7), generator=generator)
    target = torch.randint(0, 3, (11, 6, 7), generator=generator)
    whole = confusion_matrix(predicted, target, 5, 3)
    for size in (1, 2, 4, 11):
        parts = zip(predicted.split(size), target.split(size))
        assert sum(confusion_matrix(p, t, 5, 3) for p, t in parts).equal(whole)


def test_perfect_prediction_scores_one_under_any_renaming():
    target = torch.tensor([0, 0, 1, 2, 2, 2])
    confusion = confusion_matrix(torch.tensor([3, 1, 0])[target], target, 4, 3)
    assert match(confusion).tolist() == [2, 1, UNMATCHED, 0]
    for classes in (match(confusion), majority(confusion)):
        assert miou(confusion, classes) == pixel_accuracy(confusion, classes) == 1
    assert nmi(confusion) == pytest.approx(1)
    assert adjusted_rand_index(confusion) == pytest.approx(1)


def test_constant_prediction_earns_the_largest_class_alone():
    confusion = torch.tensor([[0, 0, 0], [50, 30, 20]])
    classes = match(confusion)
    assert pixel_accuracy(confusion, classes) == pytest.approx(0.5)
    assert miou(confusion, classes) == pytest.approx(0.5 / 3)
    assert nmi(confusion) == pytest.approx(0, abs=1e-12)
    assert adjusted_rand_index(confusion) == pytest.approx(0)


def test_independent_prediction_gives_the_closed_form():
    confusion = torch.full(
        (4, 4), 25
    )  # every prototype covers every class equally: tp 25, union 175
    assert miou(confusion, match(confusion)) == pytest.approx(1 / 7)
    assert pixel_accuracy(confusion, match(confusion)) == pytest.approx(1 / 4)
    assert nmi(confusion) == pytest.approx(0, abs=1e-12)
    assert adjusted_rand_index(torch.full((4, 4), 2500)) == pytest.approx(0, abs=1e-3)


def test_iou_solved_by_hand_with_an_unmatched_prototype_and_an_absent_class():
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [4, 1, 0]])
    classes = torch.tensor(
        [0, 1, UNMATCHED]
    )  # class 0: tp 6, fp 2, fn 1 + 4; class 1: tp 3, fp 1, fn 2 + 1
    assert iou(confusion, classes)[:2].tolist() == pytest.approx([6 / 13, 3 / 7])
    assert iou(confusion, classes)[2].isnan()
    assert miou(confusion, classes) == pytest.approx((6 / 13 + 3 / 7) / 2)
    assert pixel_accuracy(confusion, classes) == pytest.approx(9 / 17)


def test_many_to_one_merges_prototypes_of_one_class():
    confusion = torch.tensor([[5, 1], [4, 0], [0, 7], [0, 0]])
    assert majority(confusion).tolist() == [0, 0, 1, UNMATCHED]
    assert pixel_accuracy(confusion, majority(confusion)) == pytest.approx(16 / 17)
    assert miou(confusion, majority(confusion)) == pytest.approx((9 / 10 + 7 / 8) / 2)


def test_many_to_one_never_has_fewer_right_pixels_than_one_to_one():
    for seed in range(5):
        confusion = random_confusion(9, 4, seed)
        assert pixel_accuracy(confusion, majority(confusion)) >= pixel_accuracy(
            confusion, match(confusion)
        )


def test_mutual_information_equals_a_sum_over_the_table():
    confusion = random_confusion(5, 3, seed=4)
    joint = confusion.double() / confusion.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    cells = [(p, c) for p in range(5) for c in range(3) if joint[p, c] > 0]
    information = sum(joint[p, c] * (joint[p, c] / (rows[p] * columns[c])).log() for p, c in cells)
    entropies = -(rows * rows.log()).sum() - (columns * columns.log()).sum()
    assert nmi(confusion) == pytest.approx(float(2 * information / entropies))
    assert nmi(confusion) == pytest.approx(nmi(confusion.T))


def test_rand_index_equals_counting_all_pairs_of_pixels():
    generator = torch.Generator().manual_seed(3)
    groups = torch.randint(0, 4, (40,), generator=generator)
    classes = torch.where(torch.rand(40, generator=generator) < 0.6, groups % 3, 2)
    both = in_groups = in_classes = total = 0
    for i in range(40):
        for j in range(i):
            same_group, same_class = groups[i] == groups[j], classes[i] == classes[j]
            both += same_group & same_class
            in_groups += same_group
            in_classes += same_class
            total += 1
    expected = in_groups * in_classes / total
    by_hand = (both - expected) / ((in_groups + in_classes) / 2 - expected)
    assert adjusted_rand_index(confusion_matrix(groups, classes, 4, 3)) == pytest.approx(
        float(by_hand)
    )


def test_rand_index_of_one_segment_against_one_segment_is_one_and_of_large_images_is_exact():
    assert adjusted_rand_index(torch.tensor([[12]])) == 1
    assert adjusted_rand_index(torch.tensor([[10**6, 0], [0, 10**6]])) == pytest.approx(1)


def test_no_labeled_pixel_scores_zero():
    nothing = confusion_matrix(torch.zeros(6, dtype=torch.long), torch.full((6,), IGNORE), 3, 2)
    assert nothing.sum() == 0
    assert (
        miou(nothing, match(nothing))
        == pixel_accuracy(nothing, match(nothing))
        == nmi(nothing)
        == 0
    )


def test_wrong_input_is_refused_with_the_numbers_seen():
    zeros = torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(5,\) and target \(4,\)"):
        confusion_matrix(zeros, zeros[:4], 3, 2)
    with pytest.raises(ValueError, match=r"class ids run from 0 to 2, outside 0\.\.1"):
        confusion_matrix(zeros, torch.tensor([0, 0, 2, IGNORE, 1]), 3, 2)
    with pytest.raises(ValueError, match=r"prototype ids run from -1 to 0, outside 0\.\.2"):
        confusion_matrix(zeros - torch.tensor([1, 0, 0, 0, 0]), zeros, 3, 2)
    with pytest.raises(ValueError, match="4 names for 3 prototypes"):
        miou(torch.ones(3, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long))
