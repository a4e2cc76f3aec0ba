"""What a view looks like may change, what it shows may not: colors, blur and solarization.

Slide: "Prior 1: geometric covariance, photometric invariance".
Paper: section 3.1, implementation details.
Read next: train.py.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

# What torchvision's weights, and everybody downstream, expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # red, green, blue -> gray: ITU-R 601-2, rounded as torchvision does


def normalize(images: Tensor) -> Tensor:
    """(value - mean) / std, per color: images (... 3 y x) uint8 0..255, or float 0..1 -> float."""
    if not images.is_floating_point():
        images = images.float() / 255
    mean, std = (_constant(x, images.device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tuple as a float32 tensor, copied once, since the host waits for every copy to a GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Draw(NamedTuple):
    """What will happen to each view. None: it happens to no view, and is not computed."""

    order: Tensor | None  # (b v 3) sequence of the blends: 0 brightness, 1 contrast, 2 saturation
    factors: Tensor | None  # (b v 3) of brightness, contrast and saturation; 1 = unchanged
    hue: Tensor | None  # (b v) turns of the color circle, -0.5..0.5; 0 = unchanged
    hue_position: Tensor | None  # (b v) how many blends come before the hue, 0..3
    gray: Tensor | None  # (b v) bool
    sigma: Tensor | None  # (b v) of the blur, in pixels of the view; 0 = sharp
    solarize: Tensor | None  # (b v) bool


class Photometric:
    """Color jitter in random order, then gray, blur, solarize; each view has its own numbers.

    jitter: strengths of brightness, contrast and saturation, whose factors are U(1 - a, 1 + a) cut
    at 0; of the hue, U(-a, a) turns, a <= 0.5; probability of the jitter. p_gray: probability.
    p_blur: probability in view 1 and 2. solarize: probability in view 1 and 2, and the gray level
    from which on values are inverted; 0 inverts all. blur_sigma: range, pixels of the view. The
    defaults are [O]. Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        jitter: tuple[float, float, float, float, float] = (0.4, 0.4, 0.2, 0.1, 0.8),
        p_gray: float = 0.2,
        p_blur: tuple[float, float] = (1.0, 0.1),
        solarize: tuple[float, float, float] = (0.0, 0.2, 128),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
    ):
        sizes = len(jitter), len(p_blur), len(solarize), len(blur_sigma)
        if sizes != (5, 2, 3, 2):
            raise ValueError(
                f"jitter, p_blur, solarize, blur_sigma have 5 2 3 2 numbers, not {sizes}"
            )
        probabilities = (jitter[4], p_gray, *p_blur, *solarize[:2])
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError(f"probabilities lie in 0..1, found {probabilities}")
        if min(jitter[:4]) < 0 or jitter[3] > 0.5:
            raise ValueError(f"strengths are >= 0 and that of the hue <= 0.5, found {jitter[:4]}")
        if not 0 < blur_sigma[0] <= blur_sigma[1]:
            raise ValueError(f"blur_sigma is a range of positive numbers, found {blur_sigma}")
        self.strengths, self.hue, self.p_jitter = tuple(jitter[:3]), jitter[3], jitter[4]
        self.p_gray, self.p_blur = p_gray, tuple(p_blur)
        self.p_solarize, self.threshold = tuple(solarize[:2]), solarize[2] / 255
        self.blur_sigma = blur_sigma
        self.blur_radius = math.ceil(4 * blur_sigma[1])  # 6e-5 of the weight lies outside [U]

    def __call__(self, views: Tensor, generator: torch.Generator) -> Tensor:
        """Draws and applies: views (b v 3 y x) uint8 -> (b v 3 y x) float32, normalized."""
        return self.apply(views, self.draw(len(views), generator))

    def draw(self, b: int, generator: torch.Generator) -> Draw:
        """The parameters of b images, from one call of the generator and on its device."""
        device = generator.device
        # (b v 13), each in 0..1
        drawn = torch.rand(b, 2, 13, generator=generator, device=device)
        jitter, hue, hue_position, gray, blur, sigma, solarize = drawn[..., :7].unbind(-1)
        jitter, blends = jitter < self.p_jitter, self.p_jitter > 0 and any(self.strengths)
        strongest = 1 + _constant(self.strengths, device)
        weakest = (2 - strongest).clamp(min=0)
        factors = weakest + (strongest - weakest) * drawn[..., 7:10]
        turns = self.p_jitter > 0 and self.hue > 0
        blur, (low, high) = blur < _constant(self.p_blur, device), self.blur_sigma
        solarized = solarize < _constant(self.p_solarize, device)
        return Draw(
            order=drawn[..., 10:].argsort(dim=-1) if blends else None,
            factors=torch.where(jitter[..., None], factors, 1) if blends else None,
            hue=torch.where(jitter, self.hue * (2 * hue - 1), 0) if turns else None,
            hue_position=(4 * hue_position).long() if turns else None,
            gray=gray < self.p_gray if self.p_gray else None,
            sigma=torch.where(blur, low + (high - low) * sigma, 0) if any(self.p_blur) else None,
            solarize=solarized if any(self.p_solarize) else None,
        )

    def apply(self, views: Tensor, draw: Draw) -> Tensor:
        """Changes every view as drawn; shapes as in __call__. views stay as they are."""
        pixels = rearrange(views, "b v c y x -> (b v) c y x").float() / 255
        draw = Draw(*(None if t is None else t.to(views.device).flatten(0, 1) for t in draw))
        blends = blend_weights(draw)
        for weights in blends[:3]:
            pixels = blend(pixels, weights)
        if draw.hue is not None:
            pixels = turn_hue(pixels, draw.hue)
        for weights in blends[3:]:
            pixels = blend(pixels, weights)
        if draw.gray is not None:
            pixels = torch.lerp(pixels, luma(pixels), _per_view(draw.gray).float())
        if draw.sigma is not None:
            pixels = gaussian_blur(pixels, draw.sigma, self.blur_radius)
        if draw.solarize is not None:
            # In place stays float, which is faster than a mask, here and below.
            bright = pixels.clone().ge_(self.threshold)
            pixels = torch.lerp(pixels, 1 - pixels, bright * _per_view(draw.solarize))
        return rearrange(normalize(pixels), "(b v) c y x -> b v c y x", v=views.shape[1])


def _per_view(amount: Tensor) -> Tensor:
    """(n) -> (n 1 1 1)."""
    return rearrange(amount, "n -> n 1 1 1")


def luma(pixels: Tensor) -> Tensor:
    """Brightness of each pixel: (n 3 y x) -> (n 1 y x)."""
    red, green, blue = pixels.split(1, dim=1)  # over colors
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def blend_weights(draw: Draw) -> Tensor:
    """Brightness, contrast and saturation as one formula, so that views advance together.

    blended = f pixel + (1 - f) anchor, cut to 0..1

    The anchor is black, the mean brightness of the view, or the brightness of the pixel. Returns
    (place n 3): weights of pixel, mean brightness and own brightness at three places before the hue
    and, if there is one, three after it. Each view has 1 0 0, which changes nothing, at three of
    the six.
    """
    if draw.order is None:
        return torch.empty(0, 0)
    factor = rearrange(draw.factors.gather(1, draw.order), "n place -> place n")
    kind = rearrange(draw.order, "n place -> place n")
    if draw.hue is not None:
        before = torch.arange(3, device=factor.device)[:, None] < draw.hue_position
        factor = torch.cat([torch.where(before, factor, 1), torch.where(before, 1, factor)])
        kind = torch.cat([kind, kind])
    return torch.stack([factor, (1 - factor) * (kind == 1), (1 - factor) * (kind == 2)], dim=-1)


def blend(pixels: Tensor, weights: Tensor) -> Tensor:
    """pixels (n 3 y x) in 0..1; weights (n 3): one place of `blend_weights`."""
    own, mean, bright = (_per_view(weight) for weight in weights.unbind(1))
    gray, blended = luma(pixels), own * pixels
    blended += mean * reduce(gray, "n 1 y x -> n 1 1 1", "mean") + bright * gray
    return blended.clamp_(0, 1)


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turns the color circle of pixels (n 3 y x) in 0..1 by turns (n).

    color = top - chroma clip(2 - 6 distance, 0, 1)

    top: the largest color of the pixel; chroma: largest - smallest; distance: on the circle, in
    turns, from the hue to the opposite of the color.
    """
    red, green, blue = pixels.unbind(1)
    top, bottom = pixels.amax(dim=1), pixels.amin(dim=1)  # over colors
    chroma = top - bottom
    red_leads, green_leads = (top - red).eq_(0), (top - green).eq_(0)  # 0 or 1
    hue = torch.lerp(red - green + 4 * chroma, blue - red + 2 * chroma, green_leads)
    hue = torch.lerp(hue, green - blue, red_leads) / (6 * chroma).clamp_(min=1e-12)  # gray: 0
    # The opposites of red, green and blue, seen from the hue's zero.
    opposite = _constant((1 / 2, 1 / 6, -1 / 6), pixels.device)[:, None, None]
    distance = rearrange(hue, "n y x -> n 1 y x") + _per_view(turns) + opposite
    missing = (distance - distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(top[:, None], chroma[:, None], missing, value=-1)


def gaussian_blur(pixels: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian, mirrored at the border, as two matrix products.

    pixels (n 3 y x); sigma (n) pixels, 0 = sharp; radius: taps on each side of the middle one.
    """
    with torch.autocast(pixels.device.type, enabled=False):  # half precision would show as bands
        rows, columns = (
            _blur_matrix(sigma, min(radius, length - 1), length) for length in pixels.shape[2:]
        )
        return rows @ pixels @ rearrange(columns, "n 1 x i -> n 1 i x")


def _blur_matrix(sigma: Tensor, radius: int, length: int) -> Tensor:
    """(n 1 y i): the weight of pixel i of a line in pixel y of the blurred line."""
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    # 1e-3: sharp, without 0 / 0
    weights = torch.exp(-0.5 * (tap / sigma[:, None].clamp(min=1e-3)) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # over taps
    source = torch.arange(length, device=sigma.device)[:, None] + tap
    source = length - 1 - (length - 1 - source.abs()).abs()  # (y tap), mirrored at both borders
    matrix = torch.zeros(len(sigma), length, length, device=sigma.device)
    source = repeat(source, "y tap -> n y tap", n=len(sigma))
    matrix.scatter_add_(2, source, repeat(weights, "n tap -> n y tap", y=length))  # over i
    return rearrange(matrix, "n y i -> n 1 y i")
