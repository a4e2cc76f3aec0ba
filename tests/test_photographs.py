"""engine/images.py and data.py: of a large JPEG only the scale that the crops need is decoded.

Promised: the same random numbers, boxes and flips as from the whole image, nearly the same pixels,
exactly the same where nothing can be saved; upright as the camera noted; the same bad files.
"""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from data import TwoCrops, draw_crop
from engine.images import BadImage, ImageFiles, Photograph, Photographs
from engine.loader import Samples

SIZE = 24


def waves(height=301, width=403):
    """Soft waves, of another length in every color and direction: a shift of a pixel shows."""
    y, x = np.mgrid[:height, :width]
    colors = [np.sin(x / 9 + y / 31), np.sin(y / 11 - x / 40), np.cos(x / 17 + y / 14)]
    return Image.fromarray((128 + 110 * np.stack(colors, axis=-1)).astype(np.uint8))


def saved(folder, orientation=1, format="JPEG", image=None, name="a.jpg"):
    """The whole images and the photographs of a folder with this one."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = dict(save_all=True, append_images=[waves()]) if format == "MPO" else {}
    (image or waves()).save(folder / name, format, quality=97, exif=exif, **more)
    return [kind(folder, np.array([name])) for kind in (ImageFiles, Photographs)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_photograph_has_the_boxes_and_flips_of_the_whole_and_nearly_its_pixels(
    tmp_path, orientation
):
    whole, reduced = saved(tmp_path, orientation)
    assert reduced[0].shape == whole[0].shape
    crops, factors = TwoCrops(SIZE), set()
    for seed in range(60):
        expected = crops(whole[0], random.Random(seed))
        photograph = Asked(reduced[0])
        found = crops(photograph, random.Random(seed))
        factors.add(photograph.found.factor)
        assert found.boxes.equal(expected.boxes) and found.flipped.equal(expected.flipped)
        difference = (found.views.float() - expected.views.float()).abs()
        assert difference.mean() < 2.5 and difference.max() < 60
    assert factors == {2, 4, 8}


class Asked:
    """A photograph that remembers what it was asked for, and what it gave."""

    def __init__(self, photograph):
        self.photograph, self.shape = photograph, photograph.shape

    def pixels(self, most):
        self.most, self.found = most, self.photograph.pixels(most)
        return self.found


def test_the_smaller_side_of_the_smaller_crop_still_has_the_pixels_of_a_view(tmp_path):
    _, reduced = saved(tmp_path)
    for seed in range(20):
        photograph, rng = Asked(reduced[0]), random.Random(seed)
        TwoCrops(SIZE)(photograph, random.Random(seed))
        one = draw_crop(301, 403, rng)
        other = draw_crop(301, 403, rng, other=one)
        smallest = min(one[2], one[3], other[2], other[3])
        assert photograph.most == smallest / SIZE
        assert smallest / photograph.found.factor >= SIZE


@pytest.mark.parametrize(
    "most, factor",
    [(0.3, 1), (1, 1), (1.99, 1), (2, 2), (3.9, 2), (4, 4), (7.9, 4), (8, 8), (99, 8)],
)
def test_the_decoder_takes_the_smallest_scale_that_is_allowed(tmp_path, most, factor):
    _, photographs = saved(tmp_path)
    pixels = photographs[0].pixels(most)
    assert pixels.factor == factor
    assert pixels.image.shape == (3, math.ceil(301 / factor), math.ceil(403 / factor))


def test_where_nothing_can_be_saved_every_bit_is_the_same(tmp_path):
    whole, reduced = saved(tmp_path, orientation=6)
    crops = TwoCrops(160)  # half of 301 px is less
    for seed in range(20):
        expected = crops(whole[0], random.Random(seed))
        for one, other in zip(crops(reduced[0], random.Random(seed)), expected, strict=True):
            assert torch.equal(one, other)
    square = TwoCrops(SIZE, geometric=False)
    assert square(reduced[0], random.Random(0)).views.equal(square(whole[0], None).views)


@pytest.mark.parametrize("mode, format", [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "MPO")])
def test_jpegs_of_every_kind_are_reduced(tmp_path, mode, format):
    whole, reduced = saved(tmp_path, image=waves().convert(mode), format=format)
    pixels = reduced[0].pixels(4)
    assert pixels.factor == 4 and pixels.image.shape == (3, 76, 101)
    mean = whole[0].float().mean(dim=(1, 2))
    assert torch.allclose(pixels.image.float().mean(dim=(1, 2)), mean, atol=2)


@pytest.mark.parametrize("orientation", [1, 6])
def test_all_other_formats_are_whole(tmp_path, orientation):
    whole, reduced = saved(tmp_path, orientation, "PNG")
    pixels = reduced[0].pixels(8)
    assert pixels.factor == 1 and pixels.image.equal(whole[0])
    assert reduced[0].shape == whole[0].shape


def test_a_photograph_that_is_cut_short_is_replaced_with_the_numbers_of_its_own_sample(tmp_path):
    good, cut = tmp_path / "good", tmp_path / "cut"
    for folder in (good, cut):
        folder.mkdir()
        for name in ("a.jpg", "b.jpg"):
            saved(folder, name=name)
    (cut / "a.jpg").write_bytes((good / "a.jpg").read_bytes()[:9000])
    photographs = Photographs(cut, np.array(["a.jpg", "b.jpg"]))
    batch, failures = Samples(photographs, TwoCrops(SIZE), 5)[2]
    (failed,) = failures
    assert failed[0] == "a.jpg" and "truncated" in failed[1]
    expected, _ = Samples(Photographs(good, np.array(["b.jpg", "a.jpg"])), TwoCrops(SIZE), 5)[2]
    assert batch.views.equal(expected.views) and batch.boxes.equal(expected.boxes)


def test_a_photograph_is_named_in_its_complaint(tmp_path):
    (tmp_path / "x.jpg").write_text("<html>404</html>")
    with pytest.raises(BadImage, match=r"^y.jpg: not an image that Pillow knows$"):
        Photograph(tmp_path / "x.jpg", "y.jpg")
