"""measures/slot_statistics.py: how many slots are active, and how often each."""

import torch

from measures import slot_statistics as slots
from trained import COLORS, ByColor, colored


def test_slot_counts_are_those_of_a_loop_over_images():
    images, label = colored()
    label[0], images[0] = 1, COLORS[1][:, None, None]  # class c is prototype 4 - c
    batches = [(torch.arange(2), images[:2]), (torch.arange(2, 5), images[2:])]
    active, images_with = slots.slot_counts(ByColor(), batches)
    assert active.tolist() == [0, 0, 4, 5, 4] and images_with.tolist() == [0, 1, 0, 4, 0, 0]


def test_the_report_names_the_most_and_the_least_active_of_the_slots_in_use():
    active, images_with = [3, 0, 9, 9, 1, 2, 4, 0], [1, 0, 4, 0, 5, 0, 0, 0, 0]
    report = slots.slot_report(torch.tensor(active), torch.tensor(images_with))
    assert [each["prototype"] for each in report["top"]] == [2, 3, 6, 0, 5]
    assert report["bottom"] == [dict(prototype=4, images=1)]  # none that is in top
    numbers = dict(prototypes_used=6, images=10, occupied_per_image=2.8, active=active)
    assert numbers.items() <= report.items() and report["images_with"] == images_with
    text = slots.format_slots(report)
    assert "2.80 slots" in text and "6 of 8" in text and "prototype 4 (1)" in text
    few = slots.slot_report(torch.tensor([3, 0, 9]), torch.tensor([0, 6, 3, 0]))
    assert few["bottom"] == [] and "least often" not in slots.format_slots(few)
    many = slots.slot_report(torch.arange(14), torch.tensor([0] * 7 + [13] + [0] * 7))
    assert [each["prototype"] for each in many["bottom"]] == [1, 2, 3, 4, 5]
