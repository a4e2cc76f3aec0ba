"""In which images every prototype is occupied, and the best segments of each."""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import Module

from measures.streams import stream
from photometric import normalize


class Retrieval:
    """The images with the best segment of each prototype; at a tie, the earlier image.

    scores (k top), best first, -inf where fewer images were found; images (k top) int64, -1 there;
    active, cells (k) int64: images in which the prototype is occupied, and cells that it owns;
    seen: images.
    """

    def __init__(self, num_prototypes: int, top: int = 5):
        self.scores = torch.full((num_prototypes, top), -torch.inf)
        self.images = torch.full((num_prototypes, top), -1)
        self.active, self.cells = torch.zeros(2, num_prototypes, dtype=torch.long)
        self.seen = 0

    def add(self, indices: Tensor, similarity: Tensor) -> None:
        """indices (b) int64 of the images, ascending over all calls; similarity (b k h w)."""
        score, owner = rearrange(similarity, "b k h w -> b k (h w)").max(dim=1)  # over k
        # A segment's score is the mean similarity of its pixels; without a pixel, -inf.
        found = similarity.new_full(similarity.shape[:2], -torch.inf)
        found = found.scatter_reduce(1, owner, score, "mean", include_self=False).T.float().cpu()
        self.seen += len(indices)
        self.active += found.isfinite().sum(dim=1)  # over b
        self.cells += owner.flatten().bincount(minlength=len(self.cells)).cpu()
        scores = torch.cat([self.scores, found], dim=1)
        images = torch.cat([self.images, indices.expand_as(found)], dim=1)
        # Stable, with the older ones in front: at a tie the earlier image stays, and at -inf the -1
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        self.scores, self.images = scores.gather(1, order), images.gather(1, order)


@torch.no_grad()
def retrieve(
    network: Module, images: Sequence, view: Callable, top: int = 5, batch_size: int = 16,
    workers: int = 0,
) -> Retrieval:  # fmt: skip
    """The best segments of every prototype among the images; view: image (3 y x) -> square."""
    device = network.prototypes.weight.device
    found = Retrieval(network.prototypes.num_embeddings, top)
    for indices, views in stream(images, view, batch_size, workers, "prototypes"):
        found.add(indices, network(normalize(views.to(device)))[1])
    return found


def check_choice(show: Sequence[str], k: int) -> None:
    """Raises ValueError where `choose_prototypes` does not know what to show."""
    numbers = all(each.isdigit() and int(each) < k for each in show)
    if not numbers and tuple(show) not in (("used",), ("extremes",)):
        known = f"used, extremes, or numbers from 0 to {k - 1}"
        raise ValueError(f"--show {' '.join(show)}: {known}")


def choose_prototypes(active: Tensor, show: Sequence[str], count: int) -> list[int]:
    """The prototypes to draw: used, extremes, or numbers. Raises ValueError."""
    order = [int(k) for k in active.argsort(descending=True, stable=True) if active[k] > 0]
    if not order:
        raise ValueError("no prototype is occupied in any image")
    extremes = order if len(order) <= 10 else order[:5] + order[-5:]
    by_name = {"used": order[:count], "extremes": extremes}
    return by_name[show[0]] if show[0] in by_name else [int(each) for each in show]


def slot_report(found: Retrieval) -> dict:
    """Statistics of the slides; top: the five most occupied; bottom: the five least, of others."""
    order = found.active.argsort(descending=True, stable=True).tolist()
    active, count = found.active.tolist(), max(found.seen, 1)
    used = [dict(prototype=k, images=active[k]) for k in order if active[k] > 0]
    return dict(
        images=found.seen, num_prototypes=len(active), occupied_per_image=sum(active) / count,
        prototypes_used=len(used), top=used[:5], bottom=used[5:][:-6:-1], active=active,
    )  # fmt: skip


def format_slots(report: dict) -> str:
    """The report as text."""
    mean = "{occupied_per_image:.2f} slots are occupied per image, over {images} images"
    used = "{prototypes_used} of {num_prototypes} prototypes are in use"
    lines = [f"{mean}; {used}".format(**report)]
    for title, key in (("most often", "top"), ("least often, of those in use", "bottom")):
        numbers = (f"{each['prototype']} ({each['images']})" for each in report[key])
        lines += [f"{title}: prototypes {', '.join(numbers)}"] if report[key] else []
    return "\n".join(lines)
