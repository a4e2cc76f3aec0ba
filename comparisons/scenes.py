"""Toy scenes as the systems need them: input of the backbone, extra input of training, truth.

The extra input is stacked behind the image's three channels, so that both are cut, resized and
mirrored alike, by `data.TwoCrops` or `whole_scene`. All of it are amounts, which may be
interpolated.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib import colormaps
from torch import Tensor

import toy
from comparisons.given_masks import MASKS, color_clusters
from comparisons.motion import SPEED, flow_image
from data import Batch


class Scenes(toy.ToyImages):
    """`count` scenes of a seed: images (n 3+m y x) uint8 for the reader, and the truth.

    sees, extra: as in `common.System`; colors (n 3 y x) uint8: the image, whatever the input is;
    regions (n y x): every object, and both kinds of stuff, numbered from 0; more in `ToyImages`.
    """

    def __init__(
        self, seed: int, count: int, sees: str = "image", extra: str = "", preset: str = "scene"
    ):
        super().__init__(seed, count, preset)
        self.colors = self.images
        stuff = self.semantic.masked_fill(self.instance > 0, toy.NUM_STUFF)
        second = stuff != stuff.amin(dim=(1, 2), keepdim=True)  # over y x; of two kinds of stuff
        self.regions = torch.where(self.instance > 0, self.instance + 1, second)
        seen = self.colors
        if sees == "flow":
            pairs = (toy.frame_pair(seed, index, preset, SPEED) for index in range(count))
            seen = flow_image(torch.from_numpy(np.stack([pair.flow for pair in pairs])))
        elif sees == "depth":
            painted = colormaps["turbo"](self.depth.numpy(), bytes=True)[..., :3]
            seen = rearrange(torch.from_numpy(painted), "n y x rgb -> n rgb y x").contiguous()
        self.images = torch.cat([seen, self.channels(extra)], dim=1) if extra else seen

    def channels(self, kind: str) -> Tensor:
        """Extra input (n m y x) uint8: MASKS masks, 255 in one of them; kind: as `extra`."""
        n, y, x = self.semantic.shape
        if kind == "truth":
            numbers = self.regions.long()
        elif kind == "grid":
            cell = torch.arange(9).reshape(1, 1, 3, 3).float()
            numbers = F.interpolate(cell, (y, x)).long()[:, 0].expand(n, -1, -1)
        else:
            numbers = torch.stack([color_clusters(image) for image in self.colors])
        return rearrange(255 * F.one_hot(numbers, MASKS).byte(), "n y x m -> n m y x")

    @property
    def blocks(self) -> Tensor:
        """Every scene in 2 x 4 blocks (n y x): groups that know nothing but the place."""
        n, y, x = self.semantic.shape
        down, right = 2 * torch.arange(y) // y, 4 * torch.arange(x) // x
        return (4 * down[:, None] + right).expand(n, -1, -1)


def whole_scene(image: Tensor, rng: random.Random) -> Batch:
    """image (m y x) -> itself as the only view (1 m y x), in one of the eight ways it can lie."""
    mirrored = rng.random() < 0.5
    view = image.rot90(rng.randrange(4), (1, 2))
    view = view.flip(2) if mirrored else view
    return Batch(view[None], torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([mirrored]))
