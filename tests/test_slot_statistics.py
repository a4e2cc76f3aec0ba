"""measures/slot_statistics.py: how many slots are active, and how often each."""

import torch
from trained import COLORS, ByColor, colored

from measures.slot_statistics import slot_counts, slot_report


def test_slot_counts_are_those_of_a_loop_over_images():
    images, label = colored()
    label[0], images[0] = 1, COLORS[1][:, None, None]
    batches = [(torch.arange(2), images[:2]), (torch.arange(2, 5), images[2:])]
    active, images_with = slot_counts(ByColor(), batches)
    assert active.tolist() == [
        0,
        0,
        4,
        5,
        4,
    ]  # class c is prototype 4 - c; image 0 has class 1 only
    assert images_with.tolist() == [0, 1, 0, 4, 0, 0]


def test_the_least_active_slots_are_the_least_of_those_ever_active():
    report = slot_report(
        torch.tensor([3, 0, 9, 9, 1, 2, 4, 0]), torch.tensor([1, 0, 4, 0, 5, 0, 0, 0, 0])
    )
    assert [each["prototype"] for each in report["top"]] == [2, 3, 6, 0, 5]
    assert [each["prototype"] for each in report["bottom"]] == [4, 5, 0, 6, 3]
    assert [each["images"] for each in report["bottom"]] == [1, 2, 3, 4, 9]
    assert (
        report["prototypes_used"] == 6
        and report["images"] == 10
        and report["occupied_per_image"] == 2.8
    )
