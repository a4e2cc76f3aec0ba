"""engine/images.py, data.py: of a large JPEG only the scale that the crops need is decoded."""

import math
import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import TwoCrops, draw_crop
from engine.images import ImageFiles, Photographs

SIZE, HEIGHT, WIDTH = 24, 301, 403
Y, X = np.mgrid[:HEIGHT, :WIDTH]
PLACES = 255 * np.stack([X / WIDTH, Y / HEIGHT, 0.5 + 0 * X])  # (3 y x): a color is its place
UPRIGHT = {1: "", 2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}


def saved(folder, orientation=1, format="JPEG", mode="RGB"):
    """The same file as an image and as a photograph."""
    exif, image = Image.Exif(), Image.fromarray(PLACES.round().astype(np.uint8).transpose(1, 2, 0))
    exif[0x0112] = orientation
    more = dict(save_all=True, append_images=[image]) if format == "MPO" else {}
    image.convert(mode).save(folder / "a.jpg", format, quality=97, exif=exif, **more)
    if format == "PNG":  # which may note its orientation behind the pixels
        content = (folder / "a.jpg").read_bytes()
        note = content[content.index(b"eXIf") - 4 : content.index(b"IDAT") - 4]
        (folder / "a.jpg").write_bytes(content.replace(note, b"")[:-12] + note + content[-12:])
    return ImageFiles(folder, ["a.jpg"])[0], Photographs(folder, ["a.jpg"])


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_stand_upright_whole_and_reduced(tmp_path, orientation):
    steps, expected = UPRIGHT[orientation], torch.tensor(PLACES)
    expected = expected.mT if "t" in steps else expected
    expected = expected.flip([{"x": 2, "y": 1}[step] for step in steps.strip("t")])
    for format, factor in [("PNG", 1), ("JPEG", 8)]:
        whole, photographs = saved(tmp_path, orientation, format)
        assert photographs[0].shape == whole.shape == expected.shape
        assert (whole - expected).abs().max() < 4
        pixels = photographs[0].pixels(8)
        corner = pixels.image[:, : 96 // factor, : 64 // factor].double().mean(dim=(1, 2))
        assert pixels.factor == factor
        assert (corner - expected[:, :96, :64].mean(dim=(1, 2))).abs().max() < 5


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_views_of_a_reduced_photograph_agree_with_each_other_and_the_whole(tmp_path, orientation):
    (whole, photographs), crops = saved(tmp_path, orientation), TwoCrops(SIZE)
    for seed in range(40):
        photograph, rng = photographs[0], random.Random(seed)
        photograph.pixels = Mock(wraps=photograph.pixels)
        views, boxes, flipped = crops(photograph, random.Random(seed))
        one = draw_crop(*photograph.shape[1:], rng)
        other = draw_crop(*photograph.shape[1:], rng, other=one)
        photograph.pixels.assert_called_once_with(min(one[2:] + other[2:]) / SIZE)
        expected = crops(whole, random.Random(seed))
        assert flipped.equal(expected.flipped) and (boxes - expected.boxes).abs().max() < 1 / SIZE
        assert (views.float() - expected.views).abs().max() < 9
        seen = []
        for view, (x1, y1, x2, y2) in zip(views, boxes.tolist()):
            row, column = (min(SIZE - 1, int(SIZE * side / 2)) for side in (y1 + y2, x1 + x2))
            seen.append(view[:2, row, column].float())
        assert (seen[0] - seen[1]).abs().max() < 13  # of 255: one pixel of a view


@pytest.mark.parametrize("kind", ["JPEG RGB", "JPEG L", "JPEG CMYK", "MPO RGB"])
def test_jpegs_of_every_kind_are_decoded_at_the_smallest_scale_that_is_allowed(tmp_path, kind):
    whole, photographs = saved(tmp_path, 1, *kind.split())
    for factor, mosts in {1: (0.3, 1, 1.99), 2: (2, 3.9), 4: (4, 7.9), 8: (8, 99)}.items():
        for pixels in (photographs[0].pixels(most) for most in mosts):
            assert pixels.factor == factor
            assert pixels.image.shape == (3, math.ceil(HEIGHT / factor), math.ceil(WIDTH / factor))
            difference = pixels.image.float().mean(dim=(1, 2)) - whole.float().mean(dim=(1, 2))
            assert difference.abs().max() < 2


def test_where_nothing_can_be_saved_every_bit_is_the_same(tmp_path):
    whole, photographs = saved(tmp_path, orientation=6)
    for crops in (TwoCrops(160), TwoCrops(SIZE, geometric=False)):  # half of 301 px is less
        one, other = (crops(image, random.Random(3)) for image in (whole, photographs[0]))
        assert all(map(torch.equal, one, other))
