"""What a view looks like may change, what it shows may not: colors, blur and solarization.

Slide: "Prior 1: geometric-covariance and photometric-invariance".
Paper: section 3.1, implementation details.
Read next: train.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # what torchvision's weights and everybody downstream expect
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # red, green, blue -> gray: ITU-R 601-2, rounded as torchvision does
SIGMA = (0.1, 2.0)  # range of the blur's, px of the view [O]; cut at 4 sigma [U]


def normalize(images: Tensor) -> Tensor:
    """(value - mean) / std, per color: images (... 3 y x) uint8 0..255, or float 0..1 -> float."""
    images = images if images.is_floating_point() else images / 255
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


@dataclass(frozen=True)
class Photometric:
    """Color jitter in random order, then gray, blur, solarize; each view has its own numbers.

    jitter: strengths of brightness, contrast and saturation, whose factors are U(1 - a, 1 + a) cut
    at 0; of the hue, U(-a, a) turns, a <= 0.5; probability. solarize: probability in view 1 and 2,
    gray level from which on values are inverted. Raises ValueError for numbers out of range.
    """

    jitter: tuple[float, float, float, float, float] = (0.4, 0.4, 0.2, 0.1, 0.8)  # defaults: [O]
    p_gray: float = 0.2
    p_blur: tuple[float, float] = (1.0, 0.1)  # in view 1 and in view 2
    solarize: tuple[float, float, float] = (0.0, 0.2, 128)  # at level 0 all are inverted

    def __post_init__(self) -> None:
        jitter = self.jitter
        if [len(x) for x in (jitter, self.p_blur, self.solarize)] != [5, 2, 3]:
            raise ValueError(f"jitter, p_blur, solarize have 5 2 3 numbers: {self}")
        probabilities = (jitter[4], self.p_gray, *self.p_blur, *self.solarize[:2])
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError(f"probabilities lie in 0..1, found {probabilities}")
        if min(jitter[:4]) < 0 or jitter[3] > 0.5:
            raise ValueError(f"strengths are >= 0 and that of the hue <= 0.5, found {jitter[:4]}")

    def __call__(self, views: Tensor, generator: torch.Generator) -> Tensor:
        """Draws and applies: views (b v 3 y x) uint8 -> (b v 3 y x) float32, normalized."""
        return self.apply(views, self.draw(len(views), generator))

    def draw(self, b: int, generator: torch.Generator) -> Draw:
        """The parameters of b images, from one call of the generator and on its device."""
        device, (*strengths, most_turns, p_jitter) = generator.device, self.jitter
        drawn = torch.rand(b, 2, 13, generator=generator, device=device)  # (b v 13) in 0..1
        jitter, hue, hue_position, gray, blur, sigma, solarize = drawn[..., :7].unbind(-1)
        jitter, blends = jitter < p_jitter, p_jitter > 0 and any(strengths)
        strongest = 1 + _constant(tuple(strengths), device)
        weakest = (2 - strongest).clamp(min=0)
        factors = weakest + (strongest - weakest) * drawn[..., 7:10]
        turns = p_jitter > 0 and most_turns > 0
        blur, (low, high) = blur < _constant(tuple(self.p_blur), device), SIGMA
        p_solarize = tuple(self.solarize[:2])
        return Draw(
            order=drawn[..., 10:].argsort(dim=-1) if blends else None,
            factors=torch.where(jitter[..., None], factors, 1) if blends else None,
            hue=torch.where(jitter, most_turns * (2 * hue - 1), 0) if turns else None,
            hue_position=(4 * hue_position).long() if turns else None,
            gray=gray < self.p_gray if self.p_gray else None,
            sigma=torch.where(blur, low + (high - low) * sigma, 0) if any(self.p_blur) else None,
            solarize=solarize < _constant(p_solarize, device) if any(p_solarize) else None,
        )

    def apply(self, views: Tensor, draw: Draw) -> Tensor:
        """Changes every view as drawn; shapes as in __call__. views stay as they are."""
        pixels = rearrange(views, "b v c y x -> (b v) c y x").float() / 255
        draw = Draw(*(None if t is None else t.to(views.device).flatten(0, 1) for t in draw))
        blends = blend_weights(draw) if draw.order is not None else []
        pixels = functools.reduce(blend, blends[:3], pixels)
        if draw.hue is not None:
            pixels = turn_hue(pixels, draw.hue)
        pixels = functools.reduce(blend, blends[3:], pixels)
        if draw.gray is not None:
            pixels = torch.lerp(pixels, luma(pixels), draw.gray[:, None, None, None].float())
        if draw.sigma is not None:
            pixels = gaussian_blur(pixels, draw.sigma, math.ceil(4 * SIGMA[1]))
        if draw.solarize is not None:
            # In place stays float, which is faster than a mask, here and below.
            bright = pixels.clone().ge_(self.solarize[2] / 255)
            pixels = torch.lerp(pixels, 1 - pixels, bright * draw.solarize[:, None, None, None])
        return rearrange(normalize(pixels), "(b v) c y x -> b v c y x", v=views.shape[1])


def luma(pixels: Tensor) -> Tensor:
    """Brightness of each pixel: (n 3 y x) -> (n 1 y x)."""
    red, green, blue = pixels.split(1, dim=1)  # over colors
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def blend_weights(draw: Draw) -> Tensor:
    """Brightness, contrast and saturation as one formula, so that all views take a step at once.

    blended = f pixel + (1 - f) anchor, cut to 0..1; anchor: 0, the mean luma, the pixel's luma

    Returns (place n 3): weights of pixel, mean luma and own luma at three places before the hue
    and, if there is one, three after it. At three of these six a view has 1 0 0: no change.
    """
    factor = rearrange(draw.factors.gather(1, draw.order), "n place -> place n")
    kind = rearrange(draw.order, "n place -> place n")
    if draw.hue is not None:
        before = torch.arange(3, device=factor.device)[:, None] < draw.hue_position
        factor = torch.cat([torch.where(before, factor, 1), torch.where(before, 1, factor)])
        kind = torch.cat([kind, kind])
    return torch.stack([factor, (1 - factor) * (kind == 1), (1 - factor) * (kind == 2)], dim=-1)


def blend(pixels: Tensor, weights: Tensor) -> Tensor:
    """pixels (n 3 y x) in 0..1; weights (n 3): one place of `blend_weights`."""
    own, mean, bright = rearrange(weights, "n weight -> weight n 1 1 1")
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
    opposite = _constant((1 / 2, 1 / 6, -1 / 6), pixels.device)[:, None, None]  # red, green, blue
    distance = hue[:, None] + turns[:, None, None, None] + opposite
    missing = (distance - distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(top[:, None], chroma[:, None], missing, value=-1)


def gaussian_blur(pixels: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """pixels (n 3 y x); sigma (n) px, 0 = sharp: 2 radius + 1 taps, mirrored at the border."""
    with torch.autocast(pixels.device.type, enabled=False):  # half precision would show as bands
        rows, columns = (_blur_matrix(sigma, radius, length) for length in pixels.shape[2:])
        return rows @ pixels @ rearrange(columns, "n 1 x i -> n 1 i x")


def _blur_matrix(sigma: Tensor, radius: int, length: int) -> Tensor:
    """(n 1 y i): the weight of pixel i of a line in pixel y of the blurred line."""
    radius = min(radius, length - 1)
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (tap / sigma[:, None].clamp(min=1e-3)) ** 2)  # 1e-3: no 0 / 0
    weights = repeat(weights / weights.sum(dim=1, keepdim=True), "n tap -> n y tap", y=length)
    source = torch.arange(length, device=sigma.device)[:, None] + tap
    source = length - 1 - (length - 1 - source.abs()).abs()  # (y tap), mirrored at both borders
    matrix = torch.zeros(len(sigma), length, length, device=sigma.device)
    matrix.scatter_add_(2, source.expand_as(weights), weights)  # over i
    return rearrange(matrix, "n y i -> n 1 y i")
