"""Two views of one image: crops that overlap, where they overlap, and which of them are mirrored.

Slide: "Prior 1: geometric-covariance and photometric-invariance", the first half.
Paper: section 3.1.
Read next: photometric.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from engine.images import Photograph, Pixels

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height [O]
OVERLAP = 0.01  # with the first crop, at least, as a share of the second [O]
FLIP = 0.5  # probability, for each view [O]
TRIES = 10  # draws before the fallback [O]

Crop = tuple[int, int, int, int]  # top, left, height, width, px


class Batch(NamedTuple):
    """Two views of b images. Of a single image: the same without the axis b."""

    views: Tensor  # (b v 3 y x) uint8
    boxes: Tensor  # (b v 4) float32, the overlap: x1 y1 x2 y2 in 0..1 of a view, mirrored like it
    flipped: Tensor  # (b v) bool: the view is mirrored


class TwoCrops:
    """Cuts two views out of an image: a function of the image and the random generator alone.

    image_size: side of a view, px. min_area: of a crop, as a share of the image. geometric=False:
    both views are the center square, not mirrored (table 8e). Raises ValueError for numbers out of
    range.
    """

    def __init__(self, image_size: int = 224, min_area: float = 0.08, geometric: bool = True):
        if image_size < 1 or not 0 < min_area <= 1:
            found = f"found {image_size}, {min_area}"
            raise ValueError(f"image_size is at least 1 and 0 < min_area <= 1, {found}")
        self.image_size, self.min_area, self.geometric = image_size, min_area, geometric

    def __call__(self, image: Tensor | Photograph, rng: random.Random) -> Batch:
        """image (3 y x) uint8, or a file that holds one -> views (v 3 y x), boxes (v 4), flipped
        (v). Raises BadImage of a file, of which as few pixels are decoded as the crops need.
        """
        if not self.geometric:
            whole = image if isinstance(image, Tensor) else image.pixels().image
            views = center_square(whole, self.image_size).expand(2, -1, -1, -1)
            boxes = torch.tensor([[0.0, 0, 1, 1]] * 2)
            return Batch(views.contiguous(), boxes, torch.tensor([False, False]))
        height, width = image.shape[1:]
        first = draw_crop(height, width, rng, self.min_area)
        second = draw_crop(height, width, rng, self.min_area, first)
        flipped = [rng.random() < FLIP for _ in range(2)]
        reduction = min(*first[2:], *second[2:]) / self.image_size
        pixels = Pixels(image) if isinstance(image, Tensor) else image.pixels(reduction)
        # Before the boxes: a crop of a reduced image has edges between whole pixels.
        crops = [pixels.snapped(crop) for crop in (first, second)]
        views = [
            resized_crop(pixels.image, crop, self.image_size, mirrored)
            for crop, mirrored in zip(crops, flipped)
        ]
        return Batch(torch.stack(views), overlap_boxes(*crops, flipped), torch.tensor(flipped))


def draw_crop(
    height: int, width: int, rng: random.Random, min_area: float = 0.08, other: Crop | None = None
) -> Crop:
    """Area U(min_area, 1) of the image, ratio log-uniform in RATIO, place uniform [O].

    Without `other`: TRIES draws until one fits, then the largest center crop of an allowed ratio.
    With `other`, the first crop: a draw must also share OVERLAP of its area, as drawn and not
    yet rounded to pixels [O], with it; if no draw does, the first crop is ignored.
    """
    for _ in range(TRIES):
        area = rng.uniform(min_area, 1.0) * height * width
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            crop = rng.randint(0, height - h), rng.randint(0, width - w), h, w
            if other is None or intersection(crop, other) >= OVERLAP * area:
                return crop
    if other is not None:
        return draw_crop(height, width, rng, min_area)
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def shared_edges(crop1: Crop, crop2: Crop) -> tuple[int, int, int, int]:
    """top, left, bottom, right of what two crops share; bottom <= top or right <= left: nothing."""
    (top1, left1, height1, width1), (top2, left2, height2, width2) = crop1, crop2
    bottom, right = min(top1 + height1, top2 + height2), min(left1 + width1, left2 + width2)
    return max(top1, top2), max(left1, left2), bottom, right


def intersection(crop1: Crop, crop2: Crop) -> int:
    """The number of pixels that two crops share."""
    top, left, bottom, right = shared_edges(crop1, crop2)
    return max(0, bottom - top) * max(0, right - left)


def overlap_boxes(crop1: Crop, crop2: Crop, flipped: Sequence[bool] = (False, False)) -> Tensor:
    """Where two crops of one image overlap, as inverse augmentation needs it.

    flipped: whether each view is mirrored after cropping -> (v 4) float32: x1 y1 x2 y2 in 0..1 of
    each view, mirrored like the view; 0 0 0 0 if the crops share nothing [U].
    """
    top, left, bottom, right = shared_edges(crop1, crop2)
    if right <= left or bottom <= top:
        return torch.zeros(2, 4)
    boxes = []
    for (y, x, h, w), mirrored in zip((crop1, crop2), flipped):
        x1, x2 = (left - x) / w, (right - x) / w
        x1, x2 = (1 - x2, 1 - x1) if mirrored else (x1, x2)
        boxes.append((x1, (top - y) / h, x2, (bottom - y) / h))
    return torch.tensor(boxes)


def resized_crop(image: Tensor, crop: Crop, size: int, flipped: bool) -> Tensor:
    """image (3 y x) uint8 -> the crop as a view (3 size size) uint8: bicubic with antialias."""
    top, left, height, width = crop
    window = image[None, :, top : top + height, left : left + width]
    view = F.interpolate(window, (size, size), mode="bicubic", antialias=True)[0]
    return view.flip(-1) if flipped else view


def center_square(image: Tensor, size: int) -> Tensor:
    """image (3 y x) uint8 -> (3 size size): the short side becomes 256 for 224, then the center."""
    short, bicubic = round(size * 256 / 224), InterpolationMode.BICUBIC
    resized = resize(middle(image), [short], bicubic, antialias=True)
    return center_crop(resized, [size, size]).contiguous()


def middle(image: Tensor) -> Tensor:
    """Of a panorama (... y x) the middle, four short sides long [U]."""
    longest = 4 * min(image.shape[-2:])
    skip_y, skip_x = (max(0, length - longest) // 2 for length in image.shape[-2:])
    return image[..., skip_y : skip_y + longest, skip_x : skip_x + longest]
