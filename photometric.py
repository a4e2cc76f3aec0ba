"""What a view looks like may change, what it shows may not: colors, blur and solarization of a
whole batch.

Slide: "Prior 1: geometric covariance, photometric invariance".
Paper: section 3.1, implementation details.
Differs: the released code rounds to whole gray levels between any two steps, here they stay float32
(about one gray level brighter); its blur is an approximation by boxes, here it is the Gaussian
itself, cut at 4 sigma. A whole batch is changed at once, on the device, with parameters of its own
for every view.
Read next: train.py.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

# What torchvision's weights, and so everybody downstream, expect
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # red, green, blue -> gray: ITU-R 601-2, rounded as torchvision does
# pixels at a time on a CPU: what no view among them needs is skipped, the rest stays cached [U]
CPU_CHUNK = 100_000
CPU_BLOCK = 32  # side of the blocks in which a blur's matrix is applied on a CPU [U]


def normalize(images: Tensor) -> Tensor:
    """Pixels on the scale that networks expect: (value - mean) / std, per color.

    images: (... 3 y x) uint8 0..255, or float 0..1. Returns float of the same shape.
    """
    if not images.is_floating_point():
        images = images.float() / 255
    mean, std = (
        _constant(statistic, images.device)[:, None, None]
        for statistic in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (images - mean) / std


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tuple as a float32 tensor, copied once, since the host waits for every copy to a GPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Draw(NamedTuple):
    """What will happen to each view. Tensors (b v); None: to no view of any batch, so it is not
    even computed.
    """

    order: Tensor | None  # (b v 3) sequence of the blends: 0 brightness, 1 contrast, 2 saturation
    factors: Tensor | None  # (b v 3) of brightness, contrast and saturation; 1 = unchanged
    hue: Tensor | None  # turns of the color circle, -0.5..0.5; 0 = unchanged
    hue_position: Tensor | None  # how many blends come before the hue, 0..3
    gray: Tensor | None  # bool
    sigma: Tensor | None  # of the blur, in pixels of the view; 0 = sharp
    solarize: Tensor | None  # bool


class Photometric:
    """Color jitter in random order, then gray, blur, solarize: every view with draws of its own.

    jitter: strengths of brightness, contrast, saturation and hue, and the probability of all four
    together; a factor is U(1 - strength, 1 + strength), cut at 0, the hue turns by U(-hue, hue) <=
    0.5 of the circle. p_gray: for every view alike. p_blur: one probability per view. solarize: one
    probability per view, then the gray level from which on values are inverted; 0 inverts the whole
    view. blur_sigma: range in pixels of the view. The defaults are [O].
    """

    def __init__(
        self,
        jitter: tuple[float, float, float, float, float] = (0.4, 0.4, 0.2, 0.1, 0.8),
        p_gray: float = 0.2,
        p_blur: tuple[float, float] = (1.0, 0.1),
        solarize: tuple[float, float, float] = (0.0, 0.2, 128),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
    ):
        *strengths, hue, p_jitter = jitter
        *p_solarize, threshold = solarize
        probabilities = (p_jitter, p_gray, *p_blur, *p_solarize)
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError(f"probabilities lie in 0..1, found {probabilities}")
        if min(*strengths, hue) < 0 or hue > 0.5:
            raise ValueError(
                "brightness, contrast and saturation are >= 0 and hue is 0..0.5, found "
                f"{strengths} and {hue}"
            )
        if not 0 < blur_sigma[0] <= blur_sigma[1]:
            raise ValueError(f"blur_sigma is a range of positive numbers, found {blur_sigma}")
        self.strengths, self.hue = tuple(strengths), hue
        self.p_jitter, self.p_gray = p_jitter, p_gray
        self.p_blur, self.p_solarize = tuple(p_blur), tuple(p_solarize)
        self.blur_sigma = blur_sigma
        self.blur_radius = math.ceil(4 * blur_sigma[1])  # 6e-5 of the weight lies outside [U]
        self.threshold = threshold / 255

    def __call__(self, views: Tensor, generator: torch.Generator) -> Tensor:
        """Draws and applies. views: (b v 3 y x) uint8. Returns (b v 3 y x) float32, normalized."""
        return self.apply(views, self.draw(len(views), generator))

    def draw(self, b: int, generator: torch.Generator) -> Draw:
        """The parameters of b images, from one call of the generator and on its device."""
        device = generator.device
        # Each in 0..1
        drawn = torch.rand(b, len(self.p_blur), 13, generator=generator, device=device)
        jitter, hue, hue_position, gray, blur, sigma, solarize = drawn[..., :7].unbind(-1)
        jitter = jitter < self.p_jitter
        blends, turns = (
            self.p_jitter > 0 and any(self.strengths),
            self.p_jitter > 0 and self.hue > 0,
        )
        strongest = 1 + _constant(self.strengths, device)
        weakest = (2 - strongest).clamp(min=0)
        factors = weakest + (strongest - weakest) * drawn[..., 7:10]
        blur, (low, high) = blur < _constant(self.p_blur, device), self.blur_sigma
        return Draw(
            order=drawn[..., 10:].argsort(dim=-1) if blends else None,
            factors=torch.where(jitter[..., None], factors, 1) if blends else None,
            hue=torch.where(jitter, self.hue * (2 * hue - 1), 0) if turns else None,
            hue_position=(4 * hue_position).long() if turns else None,
            gray=gray < self.p_gray if self.p_gray else None,
            sigma=torch.where(blur, low + (high - low) * sigma, 0) if any(self.p_blur) else None,
            solarize=solarize < _constant(self.p_solarize, device)
            if any(self.p_solarize)
            else None,
        )

    def apply(self, views: Tensor, draw: Draw) -> Tensor:
        """Changes every view as drawn, the same way every time. Shapes as in __call__; views stay
        as they are.
        """
        pixels = rearrange(views, "b v c y x -> (b v) c y x")
        draw = Draw(*(None if t is None else t.to(views.device).flatten(0, 1) for t in draw))
        blends = blend_weights(draw)
        changed = torch.empty(pixels.shape, device=views.device)
        on_cpu = views.device.type == "cpu"
        chunk = max(1, CPU_CHUNK // math.prod(pixels.shape[2:]) if on_cpu else len(pixels))
        for start in range(0, len(pixels), chunk):
            rows = slice(start, start + chunk)
            some = Draw(*(None if t is None else t[rows] for t in draw))
            changed[rows] = normalize(
                self._change(pixels[rows].float() / 255, some, blends[:, rows])
            )
        return rearrange(changed, "(b v) c y x -> b v c y x", v=views.shape[1])

    def _change(self, pixels: Tensor, draw: Draw, blends: Tensor) -> Tensor:
        """pixels (n 3 y x) float 0..1 and what happens to them, in this order."""
        for weights in blends[:3]:
            pixels = blend(pixels, weights)
        if _wanted(draw.hue):
            pixels = turn_hue(pixels, draw.hue)
        for weights in blends[3:]:
            pixels = blend(pixels, weights)
        if _wanted(draw.gray):
            pixels = torch.lerp(pixels, luma(pixels), _per_view(draw.gray).float())
        if _wanted(draw.sigma):
            pixels = gaussian_blur(pixels, draw.sigma, self.blur_radius)
        if _wanted(draw.solarize):
            # In place stays float: faster than masks, here and below
            bright = pixels.clone().ge_(self.threshold)
            pixels = torch.lerp(pixels, 1 - pixels, bright * _per_view(draw.solarize))
        return pixels


def _wanted(amount: Tensor | None) -> bool:
    """Whether any view needs a step. A GPU is never asked, since waiting for its answer costs more
    than the step.
    """
    return amount is not None and (amount.device.type != "cpu" or bool(amount.any()))


def _per_view(amount: Tensor) -> Tensor:
    """(n) -> (n 1 1 1)."""
    return rearrange(amount, "n -> n 1 1 1")


def luma(pixels: Tensor) -> Tensor:
    """Brightness of each pixel: (n 3 y x) -> (n 1 y x)."""
    red, green, blue = pixels.split(1, dim=1)  # over colors
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def blend_weights(draw: Draw) -> Tensor:
    """Brightness, contrast and saturation as one formula, so that views in different orders advance
    together.

    Each is f * pixel + (1 - f) * anchor, cut to 0..1; the anchor is black, the view's mean
    brightness, or the pixel's own brightness. Returns (place n 3): weights of pixel, mean
    brightness, own brightness at each of three places before the hue and, if there is one, three
    after it: every view stands still, with 1 0 0, at three of six.
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
    """pixels (n 3 y x) in 0..1, weights (n 3) of the pixel, its view's mean brightness and its own
    brightness.
    """
    own, mean, bright = (_per_view(weight) for weight in weights.unbind(1))
    if not _wanted(own - 1):
        return pixels
    blended = own * pixels
    if _wanted(weights[:, 1:]):
        gray = luma(pixels)
        blended += mean * reduce(gray, "n 1 y x -> n 1 1 1", "mean") + bright * gray
    return blended.clamp_(0, 1)


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turns the color circle of pixels (n 3 y x) in 0..1 by turns (n), lightest and darkest color
    kept.

    With top and chroma = largest color and largest - smallest, and a color's distance on the
    circle, in turns, from where it is strongest: color = top - chroma * clip(2 - 6 * (distance to
    its opposite), 0, 1).
    """
    red, green, blue = pixels.unbind(1)
    top, bottom = pixels.amax(dim=1), pixels.amin(dim=1)  # over colors
    chroma = top - bottom
    red_leads, green_leads = (top - red).eq_(0), (top - green).eq_(0)  # 0 or 1
    hue = torch.lerp(red - green + 4 * chroma, blue - red + 2 * chroma, green_leads)
    # Gray has no hue: 0
    hue = torch.lerp(hue, green - blue, red_leads) / (6 * chroma).clamp_(min=1e-12)
    # Of red, green, blue, seen from the hue's zero
    opposite = _constant((1 / 2, 1 / 6, -1 / 6), pixels.device)
    distance = rearrange(hue, "n y x -> n 1 y x") + _per_view(turns) + opposite[:, None, None]
    # In place: kind to the cache
    missing = (distance - distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(top[:, None], chroma[:, None], missing, value=-1)


def gaussian_blur(pixels: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian, mirrored at the border, as two matrix products: rows * pixels * columns'.

    pixels: (n 3 y x). sigma: (n) pixels, 0 = sharp. radius: taps on each side of the center.
    """
    with torch.autocast(pixels.device.type, enabled=False):  # half precision would show as bands
        matrices = {
            length: _blur_matrix(sigma, min(radius, length - 1), length)
            for length in {*pixels.shape[2:]}
        }
        for _ in range(2):  # along y, then along what was x: each pass swaps the two
            pixels = _blur_columns(pixels, matrices[pixels.shape[2]], radius)
    return pixels


def _blur_columns(pixels: Tensor, matrix: Tensor, radius: int) -> Tensor:
    """pixels (n 3 y x), matrix (n y i) -> (n 3 x y). On a CPU in blocks that leave most of the
    matrix's zeros out.
    """
    matrix, length = rearrange(matrix, "n y i -> n 1 i y"), pixels.shape[2]
    block = CPU_BLOCK if pixels.device.type == "cpu" else length
    reach = [
        (start, max(0, start - radius), start + block + radius) for start in range(0, length, block)
    ]
    return torch.cat(
        [
            rearrange(pixels[:, :, low:high], "n c i x -> n c x i")
            @ matrix[..., low:high, y : y + block]
            for y, low, high in reach
        ],
        dim=-1,
    )


def _blur_matrix(sigma: Tensor, radius: int, length: int) -> Tensor:
    """(n y i): the weight of pixel i of a line in pixel y of the blurred line."""
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    # 1e-3: sharp, without 0 / 0
    weights = torch.exp(-0.5 * (tap / sigma[:, None].clamp(min=1e-3)) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # over taps
    source = repeat(_mirrored_taps(radius, length, sigma.device), "y tap -> n y tap", n=len(sigma))
    matrix = torch.zeros(len(sigma), length, length, device=sigma.device)
    return matrix.scatter_add_(2, source, repeat(weights, "n tap -> n y tap", y=length))  # over i


@functools.lru_cache(maxsize=8)
def _mirrored_taps(radius: int, length: int, device: torch.device) -> Tensor:
    """(y tap): the pixel that this tap of pixel y reads, mirrored at a border it would cross."""
    source = torch.arange(length)[:, None] + torch.arange(-radius, radius + 1)
    return (length - 1 - (length - 1 - source.abs()).abs()).to(device)
