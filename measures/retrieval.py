"""The best segments of every prototype in a data set, where the prototype is occupied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from grouping import GroupingNetwork
from measures.streams import stream
from photometric import normalize


def segment_scores(similarity: Tensor) -> Tensor:
    """The mean similarity of each prototype over the pixels that it owns.

    similarity (b k h w) -> (b k) in [-1, 1]; -inf where a prototype owns no pixel, so that it
    retrieves nothing there.
    """
    score, owner = similarity.max(dim=1)  # over k
    score, owner = rearrange(score, "b h w -> b (h w)"), rearrange(owner, "b h w -> b (h w)")
    empty = similarity.new_zeros(similarity.shape[:2])
    total = empty.scatter_add(1, owner, score)
    pixels = empty.scatter_add(1, owner, torch.ones_like(score))
    return torch.where(pixels > 0, total / pixels, -torch.inf)


class Retrieval:
    """The `top` images with the best segment of each prototype, and how many images it occurs in.

    scores (k top), best first, -inf where fewer images were found; images (k top) int64, -1 there;
    active (k) int64: images in which it is occupied. Its size depends on k and top alone. At a tie
    the earlier image wins.
    """

    def __init__(self, num_prototypes: int, top: int = 5):
        self.scores = torch.full((num_prototypes, top), -torch.inf)
        self.images = torch.full((num_prototypes, top), -1)
        self.active = torch.zeros(num_prototypes, dtype=torch.long)

    def add(self, indices: Tensor, similarity: Tensor) -> None:
        """indices (b) int64 of the images, ascending over all calls; similarity (b k h w)."""
        found = rearrange(segment_scores(similarity), "b k -> k b").float().cpu()
        self.active += found.isfinite().sum(dim=1)  # over b
        # Stable, with the older ones in front: at a tie the earlier image stays, and at -inf the -1
        scores, order = torch.cat([self.scores, found], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        candidates = torch.cat([self.images, indices.expand_as(found)], dim=1)
        top = self.scores.shape[1]
        self.scores, self.images = scores[:, :top], candidates.gather(1, order)[:, :top]


@torch.no_grad()
def retrieve(
    network: GroupingNetwork, images: Sequence[Tensor], view: Callable[[Tensor], Tensor], top: int,
    batch_size: int, workers: int,
) -> Retrieval:  # fmt: skip
    """The best segments of every prototype among the images; view: image (3 y x) -> square."""
    device = network.prototypes.weight.device
    found = Retrieval(network.prototypes.num_embeddings, top)
    for indices, views in stream(images, view, batch_size, workers, "prototypes"):
        found.add(indices, network(normalize(views.to(device)))[1])
    return found


def choose_prototypes(active: Tensor, show: Sequence[str], count: int) -> list[int]:
    """Which prototypes to draw. active (k): in how many images each is occupied.

    show: ["used"], the `count` most active; ["extremes"], the five most and the five least active;
    ["all"], every one in use; or numbers. Raises ValueError for others, and where none is in use.
    """
    order = [int(k) for k in active.argsort(descending=True, stable=True) if active[k] > 0]
    if not order:
        raise ValueError("no prototype is occupied in any image")
    extremes = order if len(order) <= 10 else order[:5] + order[-5:]
    by_name = {"used": order[:count], "extremes": extremes, "all": sorted(order)}
    if len(show) == 1 and show[0] in by_name:
        return by_name[show[0]]
    if not all(each.isdigit() and int(each) < len(active) for each in show):
        known = f"used, extremes, all, or numbers from 0 to {len(active) - 1}"
        raise ValueError(f"--show {' '.join(show)}: {known}")
    return [int(each) for each in show]
