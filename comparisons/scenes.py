"""Toy scenes as the systems need them: what the trunk sees, what training is told, the truth.

Slide: none. Paper: none. Differs: ours [U].

What is told is stacked behind the image's three channels, so that both are cut, resized and
mirrored by the same `data.TwoCrops`. All that is told are amounts, which may be interpolated.
"""

from __future__ import annotations

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
        if sees == "flow":
            pairs = [toy.frame_pair(seed, i, preset, SPEED) for i in range(count)]
            scenes = [pair.first for pair in pairs]
        else:
            scenes = [toy.scene(seed, i, preset) for i in range(count)]
        stack = [
            np.stack([getattr(scene, name) for scene in scenes])
            for name in ("image", "semantic", "instance", "depth")
        ]
        image, self.semantic, self.instance, depth = map(torch.from_numpy, stack)
        self.colors = rearrange(image, "n y x c -> n c y x").contiguous()
        self.regions = torch.where(self.instance > 0, self.instance + 1, stuff_of(self.semantic))
        seen = self.colors
        if sees == "flow":
            seen = flow_image(torch.from_numpy(np.stack([pair.flow for pair in pairs])))
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


def stuff_of(semantic: Tensor) -> Tensor:
    """semantic (n y x) -> 0 or 1 for the two kinds of stuff of each scene, whichever they are."""
    stuff = semantic.masked_fill(semantic >= toy.NUM_STUFF, toy.NUM_STUFF)
    lowest = stuff.amin(dim=(1, 2), keepdim=True)  # over y x
    return (stuff != lowest).to(semantic.dtype)
