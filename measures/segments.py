"""The segments that a network finds in an image: the nearest prototype of every pixel.

Slide: "Understanding the semantic grouping ability".
Paper: section 4.
Differs: the similarity maps are enlarged before the decision, as PiCIE does [P]; the released code
has no evaluation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grouping import GroupingNetwork
from photometric import normalize
from slots import occupied


def winner(maps: Tensor, size: tuple[int, int], chunk: int = 64) -> Tensor:
    """Which of k maps is the largest at each pixel; with similarities, the nearest prototype.

    maps (b k h w) -> (b y x) int64 in 0..k-1, the lower index at a tie; size: (y, x). The maps are
    enlarged, not the decisions (bilinear, pixel centers aligned) [P]; `chunk` of them at a time,
    because 2,048 maps of 320 px take 0.8 GB per image.
    """
    best = maps.new_full((len(maps), *size), -torch.inf)
    largest = torch.zeros_like(best, dtype=torch.long)
    for first in range(0, maps.shape[1], chunk):
        some = maps[:, first : first + chunk]
        enlarged = F.interpolate(some, size, mode="bilinear", align_corners=False)
        score, index = enlarged.max(dim=1)  # over k
        largest = torch.where(score > best, index + first, largest)
        best = torch.maximum(score, best)
    return largest


@torch.no_grad()
def segment(network: GroupingNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """The segments of images and the occupied prototypes, both on the CPU.

    images (b 3 y x) uint8 -> segments (b y x) int64 in 0..k-1, occupied (b k) bool. A prototype is
    occupied on the feature grid, before enlarging, as in training.
    """
    _, similarity = network(normalize(images.to(network.prototypes.weight.device)))
    return winner(similarity, images.shape[-2:]).cpu(), occupied(similarity).cpu()
