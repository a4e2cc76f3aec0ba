"""What a training step sees of a labeled image: another size, a crop, a mirror, other colors, with
its labels.

Slides: tables 2, 3 and 4. Paper: section 4.2.
Differs: all random numbers come from the generator that the loader hands in, a function of (seed,
epoch, index).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import adjust_hue

from downstream.segmentation import fitting
from measures.metrics import IGNORE
from photometric import IMAGENET_MEAN

TRIES = 10  # crops until one is varied enough [P: mmsegmentation]
GRAY = tuple(
    round(255 * value) for value in IMAGENET_MEAN
)  # what is beside the image: zero once normalized


@dataclass(frozen=True)
class CropView:
    """A square crop of the resized image: (image (3 y x) uint8, label (y x)) -> (3 crop crop),
    (crop crop).

    frame: (long, short) px that the image is fitted into, () for its own size; scale: the frame, or
    the image, is this much larger, drawn evenly; most: a crop in which one class has a larger share
    of the labeled pixels is drawn again; distort: change the colors.
    """

    crop: int
    frame: tuple[int, ...] = ()
    scale: tuple[float, float] = (0.5, 2.0)
    most: float = 0.75
    distort: bool = False

    def __call__(self, pair: tuple[Tensor, Tensor], rng: random.Random) -> tuple[Tensor, Tensor]:
        image, label = pair
        factor = rng.uniform(*self.scale)
        size = image.shape[-2:]
        frame = [side * factor for side in self.frame] or [max(size) * factor, min(size) * factor]
        size = fitting(size, *frame)
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        label = resized(label, size)
        for _ in range(TRIES):
            top, left = (rng.randint(0, max(side - self.crop, 0)) for side in size)
            part = (..., slice(top, top + self.crop), slice(left, left + self.crop))
            if self.most >= 1 or varied(label[part], self.most):
                break
        image, label = image[part], label[part].long()
        if rng.random() < 0.5:
            image, label = image.flip(-1), label.flip(-1)  # over x
        if self.distort:
            image = distorted(image, rng)
        return padded(image, label, self.crop)


def resized(label: Tensor, size: tuple[int, int]) -> Tensor:
    """label (y x) int -> (size) uint8, or float32 where an id is above 255: the same ids, of the
    nearest pixels. torch resizes no other integers; float32 has all of them up to 2^24."""
    kind = torch.uint8 if label.max() <= 255 else torch.float32
    return F.interpolate(label[None, None].to(kind), size, mode="nearest-exact")[0, 0]


def varied(label: Tensor, most: float) -> bool:
    """Whether at least two classes are there, and none has more than this share of the labeled
    pixels."""
    counts = torch.bincount(label[label != IGNORE].long())
    return bool((counts > 0).sum() > 1 and counts.max() < most * counts.sum())


def padded(image: Tensor, label: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Both filled up to a square at the right and below, with gray and with IGNORE."""
    y, x = label.shape
    if (y, x) == (side, side):
        return image, label
    whole = torch.tensor(GRAY, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    marks = torch.full((side, side), IGNORE)
    whole[:, :y, :x], marks[:y, :x] = image, label
    return whole, marks


def distorted(image: Tensor, rng: random.Random) -> Tensor:
    """Brightness +-32, contrast and saturation x 0.5..1.5, hue +-0.1 turns, each with probability
    1/2 [P: mmsegmentation].

    image (3 y x) uint8 -> the same. Contrast comes before or after saturation and hue, by chance.
    """

    def maybe(low: float, high: float) -> float | None:
        value = rng.uniform(low, high)
        return value if rng.random() < 0.5 else None

    brighter, contrast, saturation, hue = (
        maybe(-32, 32),
        maybe(0.5, 1.5),
        maybe(0.5, 1.5),
        maybe(-0.1, 0.1),
    )
    first = rng.random() < 0.5
    pixels = image.float()
    if brighter is not None:
        pixels = (pixels + brighter).clamp(0, 255)
    if contrast is not None and first:
        pixels = (pixels * contrast).clamp(0, 255)
    if saturation is not None:
        pixels = saturated(pixels, saturation)
    if hue is not None:
        pixels = adjust_hue(pixels / 255, hue) * 255
    if contrast is not None and not first:
        pixels = (pixels * contrast).clamp(0, 255)
    return pixels.round().to(torch.uint8)


def saturated(pixels: Tensor, factor: float) -> Tensor:
    """The S of HSV times factor, at most 1; hue and value stay: p -> V - (V - p) min(factor, V / (V
    - min)).

    pixels (3 y x) float 0..255.
    """
    value, least = pixels.amax(0), pixels.amin(0)  # over color
    limit = torch.where(value > least, value / (value - least).clamp(min=1e-6), factor)
    return value - (value - pixels) * limit.clamp(max=factor)


@dataclass(frozen=True)
class ObjectView:
    """A whole image of another size, mirrored half of the time, with boxes and masks.

    shorts: the short side, px, is one of these; longest: px that the long side may have at most.
    """

    shorts: Sequence[int]
    longest: int

    def __call__(
        self, pair: tuple[Tensor, dict], rng: random.Random
    ) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = pair
        y, x = image.shape[-2:]
        size = fitting((y, x), self.longest, rng.choice(self.shorts))
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        masks = F.interpolate(target["masks"][None], size, mode="nearest-exact")[0]
        boxes = target["boxes"] * torch.tensor([size[1] / x, size[0] / y] * 2)
        if rng.random() < 0.5:
            image, masks = image.flip(-1), masks.flip(-1)  # over x
            x1, y1, x2, y2 = boxes.unbind(dim=1)  # over the sides
            boxes = torch.stack([size[1] - x2, y1, size[1] - x1, y2], dim=1)
        return image, {**target, "boxes": boxes, "masks": masks}


def objects(samples: Sequence[tuple[tuple, list]]) -> tuple[tuple[list, list], list]:
    """A batch of images of unlike sizes: lists instead of tensors, and all files that were
    skipped."""
    views, failures = zip(*samples)
    images, targets = zip(*views)
    return (list(images), list(targets)), [failure for each in failures for failure in each]


def black_pixels() -> tuple[Tensor, Tensor]:
    """A black image without a label, for a rank that has none."""
    return torch.zeros(3, 64, 64, dtype=torch.uint8), torch.full((64, 64), IGNORE)


def black_objects() -> tuple[Tensor, dict[str, Tensor]]:
    """A black image with one object, for a rank that has none."""
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 1
    return torch.zeros(3, 64, 64, dtype=torch.uint8), dict(
        boxes=torch.tensor([[16.0, 16, 48, 48]]),
        labels=torch.tensor([1]),
        masks=masks,
        image_id=torch.tensor(0),
    )
