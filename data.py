"""Two views of one image: crops that overlap, where they overlap, and which of them are mirrored.

Slide: "Prior 1: geometric-covariance and photometric-invariance", the first half.
Paper: section 3.1.
Differs: crops are resized as uint8 tensors; crops that share nothing get the box 0 0 0 0, and with
it the image leaves the consistency loss; a large JPEG is decoded at a half, a quarter or an
eighth of its size where that suffices. Finding and decoding files is the work of engine/images.py.
Read next: photometric.py. Side trip: toy.py, scenes whose every pixel is known.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.images import Photograph, Pixels

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height [O]
TRIES = 10  # draws before the fallback [O]

Crop = tuple[int, int, int, int]  # top, left, height, width, px of the image


class Batch(NamedTuple):
    """Two views of b images, and where they overlap. Of a single image: the same without the axis
    b.
    """

    views: Tensor  # (b v 3 y x) uint8
    # (b v 4) float32: the overlap as x1 y1 x2 y2 in 0..1 of each view, mirrored like the view
    boxes: Tensor
    flipped: Tensor  # (b v) bool: the view is mirrored


class TwoCrops:
    """Cuts two views out of an image. A function of the image and the random generator alone.

    image_size: side of a view, px; min_area: of a crop, as a share of the image;
    min_overlap: of the second crop with the first, as a share of the second, 0: they may miss each
    other; flip: probability of mirroring, per view. geometric=False: both views are the same center
    square, not mirrored (table 8e). Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        image_size: int = 224,
        min_area: float = 0.08,
        min_overlap: float = 0.01,
        flip: float = 0.5,
        geometric: bool = True,
    ):
        shares_fit = 0 < min_area <= 1 and 0 <= min_overlap <= 1 and 0 <= flip <= 1
        if image_size < 1 or not shares_fit:
            raise ValueError(
                "image_size is at least 1, 0 < min_area <= 1, min_overlap and flip in [0, 1]; "
                f"found {image_size}, {min_area}, {min_overlap}, {flip}"
            )
        self.image_size, self.min_area = image_size, min_area
        self.min_overlap, self.flip, self.geometric = min_overlap, flip, geometric

    def __call__(self, image: Tensor | Photograph, rng: random.Random) -> Batch:
        """image (3 y x) uint8, or a file with such an image -> views (v 3 y x), boxes (v 4),
        flipped (v). rng is asked for crop, crop, flip, flip. Raises BadImage of a file.

        Of a file no more is decoded than the smaller crop needs to have the pixels of a view; boxes
        and flips are the same.
        """
        if not self.geometric:
            whole = image if isinstance(image, Tensor) else image.pixels().image
            view = center_square(whole, self.image_size)
            return Batch(
                torch.stack([view, view]),
                torch.tensor([[0.0, 0, 1, 1]] * 2),
                torch.tensor([False, False]),
            )
        height, width = image.shape[1:]
        crop1 = draw_crop(height, width, rng, self.min_area)
        crop2 = draw_crop(height, width, rng, self.min_area, crop1, self.min_overlap)
        flipped = [rng.random() < self.flip for _ in range(2)]
        if isinstance(image, Tensor):
            pixels = image
        else:
            pixels = image.pixels(min(*crop1[2:], *crop2[2:]) / self.image_size)
        views = [
            resized_crop(pixels, crop, self.image_size, flip)
            for crop, flip in zip((crop1, crop2), flipped)
        ]
        return Batch(
            torch.stack(views), overlap_boxes(crop1, crop2, flipped), torch.tensor(flipped)
        )


def draw_crop(
    height: int,
    width: int,
    rng: random.Random,
    min_area: float = 0.08,
    other: Crop | None = None,
    min_overlap: float = 0.01,
) -> Crop:
    """A crop (top, left, height, width): area U(min_area, 1) of the image, ratio log-uniform
    in RATIO, place uniform.

    Without `other`: up to TRIES draws until one fits, else the largest center crop whose ratio is
    allowed. With `other`, the first crop: a draw must also share min_overlap of its own area, as
    drawn and not yet rounded to pixels [O], with the first crop; if no draw does, the first crop is
    ignored.
    """
    for _ in range(TRIES):
        area = rng.uniform(min_area, 1.0) * height * width
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            crop = rng.randint(0, height - h), rng.randint(0, width - w), h, w
            if other is None or intersection(crop, other) >= min_overlap * area:
                return crop
    if other is not None:
        return draw_crop(height, width, rng, min_area)
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def intersection(crop1: Crop, crop2: Crop) -> int:
    """The number of pixels that two crops share."""
    (top1, left1, height1, width1), (top2, left2, height2, width2) = crop1, crop2
    high = min(top1 + height1, top2 + height2) - max(top1, top2)
    wide = min(left1 + width1, left2 + width2) - max(left1, left2)
    return max(0, high) * max(0, wide)


def overlap_boxes(
    crop1: Crop, crop2: Crop, flipped: tuple[bool, bool] | list[bool] = (False, False)
) -> Tensor:
    """Where two crops of one image overlap, in the frame of each view: what inverse augmentation
    needs.

    flipped: whether each view is mirrored after cropping. Returns (v 4) float32: x1 y1 x2 y2 in
    0..1 of the (mirrored) view; 0 0 0 0 if the crops share nothing [U].
    """
    top, left = max(crop1[0], crop2[0]), max(crop1[1], crop2[1])
    bottom = min(crop1[0] + crop1[2], crop2[0] + crop2[2])
    right = min(crop1[1] + crop1[3], crop2[1] + crop2[3])
    if right <= left or bottom <= top:
        return torch.zeros(2, 4)
    boxes = []
    for (y, x, h, w), mirrored in zip((crop1, crop2), flipped):
        x1, x2 = (left - x) / w, (right - x) / w
        x1, x2 = (1 - x2, 1 - x1) if mirrored else (x1, x2)
        boxes.append((x1, (top - y) / h, x2, (bottom - y) / h))
    return torch.tensor(boxes)


def resized_crop(image: Tensor | Pixels, crop: Crop, size: int, flipped: bool) -> Tensor:
    """image (3 y x) uint8, or a photograph that may be reduced -> the crop, in px of the whole
    image, as a view (3 size size) uint8: bicubic, antialiased, mirrored if flipped.
    """
    if isinstance(image, Pixels) and image.factor > 1:
        view = image.resized_crop(*crop, size)
    else:
        whole = image.image if isinstance(image, Pixels) else image
        top, left, height, width = crop
        window = whole[None, :, top : top + height, left : left + width]
        view = F.interpolate(window, (size, size), mode="bicubic", antialias=True)[0]
    return view.flip(-1) if flipped else view


def center_square(image: Tensor, size: int) -> Tensor:
    """image (3 y x) uint8 -> (3 size size): the short side resized to 8/7 of size (256 for 224),
    the center cut out.
    """
    # Of a panorama only this much is resized, or it would fill the memory [U]
    longest = 4 * min(image.shape[1:])
    skip_y, skip_x = (max(0, length - longest) // 2 for length in image.shape[1:])
    image = image[:, skip_y : skip_y + longest, skip_x : skip_x + longest]
    height, width = image.shape[1:]
    short = round(size * 256 / 224)
    h, w = (short, short * width // height) if height <= width else (short * height // width, short)
    resized = F.interpolate(image[None], (h, w), mode="bicubic", antialias=True)[0]
    top, left = round((h - size) / 2), round((w - size) / 2)
    return resized[:, top : top + size, left : left + size].contiguous()
