"""data.py: two crops, their overlap, and the views. Large photographs: test_photographs.py."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

import data
from data import TwoCrops, center_square, draw_crop, intersection, overlap_boxes, resized_crop


class Script:
    """A random generator whose answers are written down."""

    def __init__(self, uniform=(), randint=()):
        self.uniforms, self.randints, self.asked = list(uniform), list(randint), 0

    def uniform(self, low, high):
        self.asked += 1
        return self.answer(self.uniforms, low, high)

    def randint(self, low, high):
        return self.answer(self.randints, low, high)

    def answer(self, answers, low, high):
        assert low <= answers[0] <= high
        return answers.pop(0)


def random_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def painted(crop, height, width):
    canvas = np.zeros((height, width), dtype=bool)
    canvas[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]] = True
    return canvas


def test_boxes_hold_exactly_the_painted_pixels_that_both_crops_see():
    rng = random.Random(0)
    for _ in range(200):
        crops = [draw_crop(33, 47, rng), draw_crop(33, 47, rng)]
        flipped = [rng.random() < 0.5, rng.random() < 0.5]
        both = painted(crops[0], 33, 47) & painted(crops[1], 33, 47)
        assert intersection(*crops) == both.sum()
        for crop, mirrored, box in zip(crops, flipped, overlap_boxes(*crops, flipped)):
            seen = both[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]
            ys, xs = np.nonzero(seen[:, ::-1] if mirrored else seen)
            if not both.any():
                assert box.tolist() == [0, 0, 0, 0]
                continue
            expected = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            np.testing.assert_allclose(box, np.array(expected) / (crop[2:] * 2)[::-1], atol=1e-6)


def test_a_crop_has_the_drawn_area_and_ratio_and_a_draw_that_does_not_fit_is_repeated():
    assert draw_crop(60, 80, Script([0.25, math.log(4 / 3)], [7, 11])) == (7, 11, 30, 40)
    assert draw_crop(60, 80, Script([0.05, 0.0], [0, 0]), min_area=0.04) == (0, 0, 15, 15)
    again = Script([1.0, math.log(3 / 4), 0.25, 0.0], [1, 2])
    assert draw_crop(50, 100, again) == (1, 2, 35, 35)


@pytest.mark.parametrize("height, width, expected", [
    (40, 100, (0, 23, 40, 53)), (100, 30, (30, 0, 40, 30)), (20, 24, (0, 0, 20, 24)),
    (5000, 1, (2499, 0, 1, 1)), (1, 5000, (0, 2499, 1, 1)),
])  # fmt: skip
def test_ten_draws_that_do_not_fit_give_the_largest_centered_crop(height, width, expected):
    assert draw_crop(height, width, Script([1.0, math.log(4 / 3)] * 10)) == expected


def test_the_second_crop_must_share_one_percent_of_its_own_area_as_drawn():
    # 25.75 pixels are needed, not one percent of 51 x 51, and 26 are shared.
    rounded_up = Script([0.2575, 0.0], [0, 0])
    assert draw_crop(100, 100, rounded_up, other=(0, 0, 2, 13)) == (0, 0, 51, 51)
    # 71.4 pixels are needed, not one percent of 84 x 84, and 71 are shared.
    rounded_down = Script([0.7140, 0.0, 0.25, 0.0], [0, 0, 0, 0])
    assert draw_crop(100, 100, rounded_down, other=(0, 0, 1, 71)) == (0, 0, 50, 50)


@pytest.mark.parametrize("height, other, script, expected, asked", [
    # a second crop that misses is drawn again
    (100, (0, 0, 20, 20), ([0.25, 0.0] * 2, [50, 50, 0, 0]), (0, 0, 50, 50), 4),
    # after ten that miss, one is drawn without the condition
    (100, (0, 0, 20, 20), ([0.25, 0.0] * 11, [50, 50] * 11), (50, 50, 50, 50), 22),
    # after ten that do not fit, ten more are drawn before the center
    (40, (0, 0, 40, 40), ([1.0, 0.0] * 20, []), (0, 23, 40, 53), 40),
])  # fmt: skip
def test_a_second_crop_is_tried_ten_times(height, other, script, expected, asked):
    rng = Script(*script)
    assert draw_crop(height, 100, rng, other=other) == expected and rng.asked == asked


@pytest.mark.parametrize("height, width", [(480, 640), (1, 1), (1, 5000), (5000, 1), (7, 3)])
def test_crops_lie_inside_the_image(height, width):
    rng, other = random.Random(0), None
    for _ in range(300):
        top, left, h, w = other = draw_crop(height, width, rng, other=other)
        assert min(h, w) >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


def test_the_distribution_of_the_overlap():
    """20,000 pairs on 640x480, counted on the released rule: median overlap 0.61 of the second
    crop; 2.5e-5 of the pairs do not overlap, 2.9 % without the rule.
    """
    rng, shares, missed, missed_without = random.Random(0), [], 0, 0
    for _ in range(20_000):
        crop1 = draw_crop(480, 640, rng)
        crop2, free = draw_crop(480, 640, rng, other=crop1), draw_crop(480, 640, rng)
        shares.append(intersection(crop1, crop2) / (crop2[2] * crop2[3]))
        missed += shares[-1] == 0
        missed_without += not intersection(crop1, free)
    assert statistics.median(shares) == pytest.approx(0.61, abs=0.01)
    assert missed <= 5  # 0.5 expected
    assert missed_without / 20_000 == pytest.approx(0.029, abs=0.004)


@pytest.mark.parametrize("crop", [(0, 0, 40, 60), (3, 5, 17, 30), (39, 59, 1, 1), (0, 7, 40, 1)])
def test_a_view_is_torchvisions_resized_crop_however_the_image_lies_in_memory(crop):
    image = random_image(40, 60)
    expected = TF.resized_crop(image, *crop, (24, 24), T.InterpolationMode.BICUBIC, antialias=True)
    for lying in (image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(resized_crop(lying, crop, 24, flipped=False), expected)
        assert torch.equal(resized_crop(lying, crop, 24, flipped=True), expected.flip(-1))


@pytest.mark.parametrize("height, width", [(300, 421), (421, 300), (57, 57)])
def test_the_center_square_is_resize_256_and_center_crop_224(height, width):
    image = random_image(height, width)
    for size, short in ((224, 256), (112, 128)):
        resize = T.Resize(short, T.InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(center_square(image, size), T.CenterCrop(size)(resize(image)))


def test_the_center_square_of_a_panorama_is_that_of_its_middle():
    image = random_image(2, 6000)
    assert torch.equal(center_square(image, 28), center_square(image[:, :, 2996:3004], 28))
    assert center_square(random_image(6000, 1), 28).shape == (3, 28, 28)
    # Resized as a whole, this one would need terabytes.
    longest = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(-1, -1, 10**9)
    assert center_square(longest, 28).shape == (3, 28, 28)


def test_a_sample_is_a_function_of_image_and_generator():
    crops, image = TwoCrops(24), random_image(37, 53)
    samples = [crops(image, random.Random(seed)) for seed in range(4)]
    crops(random_image(20, 20), random.Random(9))  # what was asked before does not matter
    assert all(map(torch.equal, crops(image, random.Random(2)), samples[2]))
    for one, other in itertools.combinations(samples, 2):
        assert not torch.equal(one.boxes, other.boxes)


def test_every_view_has_its_own_flip_which_mirrors_view_and_box(monkeypatch):
    image, found = random_image(37, 53), {}
    for seed in range(11):
        for chance in (0, 1):
            monkeypatch.setattr(data, "FLIP", chance)
            found[chance] = TwoCrops(24)(image, random.Random(seed))
        plain, mirrored = found.values()
        assert not plain.flipped.any() and mirrored.flipped.all()
        assert torch.equal(mirrored.views, plain.views.flip(-1))
        x1, y1, x2, y2 = plain.boxes.unbind(1)
        torch.testing.assert_close(mirrored.boxes, torch.stack([1 - x2, y1, 1 - x1, y2], 1))
    monkeypatch.undo()
    flips = [TwoCrops(4)(image, random.Random(seed)).flipped.tolist() for seed in range(440)]
    first, second = zip(*flips)
    for found in (first, second, [a == b for a, b in flips]):
        assert statistics.mean(found) == pytest.approx(0.5, abs=0.08)


def test_views_are_the_crops_that_are_drawn_with_the_given_limit():
    image, rng = random_image(37, 53), random.Random(0)
    sample = TwoCrops(24, min_area=0.9)(image, random.Random(0))
    first = draw_crop(37, 53, rng, min_area=0.9)
    crops = first, draw_crop(37, 53, rng, min_area=0.9, other=first)
    assert min(height * width for _, _, height, width in crops) > 0.85 * 37 * 53
    for view, crop, flip in zip(sample.views, crops, flips := sample.flipped.tolist()):
        assert torch.equal(view, resized_crop(image, crop, 24, flip))
    assert torch.equal(sample.boxes, overlap_boxes(*crops, flips))


def test_without_geometry_both_views_are_the_whole_center():
    image = random_image(37, 53)
    views, boxes, flipped = TwoCrops(24, geometric=False)(image, random.Random(0))
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], center_square(image, 24))
    assert boxes.tolist() == [[0, 0, 1, 1]] * 2 and not flipped.any()
