"""Toy scenes as the systems need them: what the trunk sees, what training is told, the truth.

Slide: none. Paper: none. Differs: ours [U].

What is told is stacked behind the image's three channels, so that both are cut, resized and
mirrored by the same `data.TwoCrops`. All that is told are amounts, which may be interpolated.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import toy
from comparisons.given_masks import MASKS, color_clusters
from comparisons.motion import SPEED, flow_image


class Scenes:
    """`count` scenes of a seed: a sequence of uint8 images for the loader, and the truth.

    sees: "image" or "flow"; told: "", "depth", "grid", "color" or "truth"; preset: of toy.py.
    images (n 3+m y x) uint8: what is seen, then what is told; colors (n 3 y x) uint8: the image,
    whatever is seen; semantic (n y x) classes; regions (n y x): every object, and both kinds of
    stuff, numbered from 0; instance (n y x): 0 the stuff, then the objects.
    """

    def __init__(
        self, seed: int, count: int, sees: str = "image", told: str = "", preset: str = "scene"
    ):
        image, self.semantic, self.instance, depth = drawn(seed, count, preset)
        self.colors = rearrange(image, "n y x c -> n c y x").contiguous()
        self.regions = torch.where(self.instance > 0, self.instance + 1, stuff_of(self.semantic))
        seen = flow_image(drawn_flow(seed, count, preset)) if sees == "flow" else self.colors
        extra = [] if not told else [depth[:, None] if told == "depth" else self.masks(told)]
        self.images = torch.cat([seen, *extra], dim=1)  # over channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def masks(self, kind: str) -> Tensor:
        """The masks that are given, (n m y x) uint8 of 0 and 255."""
        n, y, x = self.semantic.shape
        if kind == "truth":
            numbers = self.regions.long()
        elif kind == "grid":
            cell = torch.arange(9).reshape(1, 1, 3, 3).float()
            numbers = F.interpolate(cell, (y, x)).long()[:, 0].expand(n, -1, -1)
        elif kind == "color":
            numbers = torch.stack([color_clusters(image) for image in self.colors])
        else:
            raise ValueError(f"masks are grid, color or truth, found {kind!r}")
        return rearrange(255 * F.one_hot(numbers, MASKS).byte(), "n y x m -> n m y x")


@functools.lru_cache(maxsize=8)
def drawn(seed: int, count: int, preset: str) -> list[Tensor]:
    """image (n y x 3), semantic, instance and depth (n y x) of the scenes, all uint8."""
    scenes = [toy.scene(seed, index, preset) for index in range(count)]
    names = ("image", "semantic", "instance", "depth")
    return [torch.from_numpy(np.stack([getattr(s, name) for s in scenes])) for name in names]


def drawn_flow(seed: int, count: int, preset: str) -> Tensor:
    """The flow (n y x 2) from each scene to the next frame, px."""
    pairs = (toy.frame_pair(seed, index, preset, SPEED) for index in range(count))
    return torch.from_numpy(np.stack([pair.flow for pair in pairs]))


def stuff_of(semantic: Tensor) -> Tensor:
    """semantic (n y x) -> 0 or 1 for the two kinds of stuff of each scene, whichever they are."""
    stuff = semantic.masked_fill(semantic >= toy.NUM_STUFF, toy.NUM_STUFF)
    lowest = stuff.amin(dim=(1, 2), keepdim=True)  # over y x
    return (stuff != lowest).to(semantic.dtype)
