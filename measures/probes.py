"""What frozen features know of classes: a linear and a nearest-neighbour classifier for every cell of the map.

Slide: none; the common way to look at features without fine-tuning. Paper: none.
Differs: ours [U]. Both learn from cells of the feature map, whose label is the mixture of classes that they cover, so
that one pass over the labelled pictures serves both and memory does not grow with their number.
Read next: evaluate.py, which measures them on pictures with labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from measures.metrics import IGNORE
from photometric import normalize

NEIGHBORS, NEIGHBOR_TEMPERATURE = 20, 0.07  # as DINO's nearest-neighbour classifier


@torch.no_grad()
def collect_cells(
    backbone: nn.Module, batches: Iterable, num_pictures: int, num_classes: int, most: int = 32_768
) -> tuple[Tensor, Tensor]:
    """Cells of the frozen map with what they show: features (n c), shares of the classes (n t) summing to 1.

    batches of (indices, (images (b 3 y x), label (b y x))). Each picture gives the same number of random cells, so
    that at most `most` are kept however many pictures there are; cells without a labelled pixel are dropped.
    """
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    features, shares = [], []
    for _, (images, label) in batches:
        maps = backbone(normalize(images.to(device)))
        h, w = maps.shape[-2:]
        known = F.one_hot(torch.where(label == IGNORE, num_classes, label), num_classes + 1)
        share = F.adaptive_avg_pool2d(rearrange(known, "b y x t -> b t y x").float(), (h, w))[:, :num_classes]
        for cells, share_of in zip(rearrange(maps, "b c h w -> b (h w) c").cpu(),
                                   rearrange(share, "b t h w -> b (h w) t")):
            kept = torch.randperm(h * w, generator=generator)[: max(most // num_pictures, 1)]
            kept = kept[share_of[kept].sum(1) > 0]
            features.append(cells[kept])
            shares.append(F.normalize(share_of[kept], p=1, dim=1))
        if sum(map(len, features)) >= most:
            break
    return torch.cat(features).float()[:most], torch.cat(shares)[:most]


def linear_probe(features: Tensor, shares: Tensor, decay: float = 1e-4) -> Callable[[Tensor], Tensor]:
    """Logistic regression from standardised features: a 1x1 convolution. Convex, so there is no rate to tune.

    features (n c), shares (n t) -> a function of maps (b c h w) that gives class scores (b t h w).
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)  # over n
    inputs = (features - mean) / std
    weight = torch.zeros(inputs.shape[1], shares.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(shares.shape[1], device=inputs.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(inputs @ weight + bias, shares) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)

    def classify(maps: Tensor) -> Tensor:
        scaled = (maps - mean[:, None, None]) / std[:, None, None]
        return einsum(scaled, weight.detach(), "b c h w, c t -> b t h w") + bias.detach()[:, None, None]

    return classify


def neighbor_probe(features: Tensor, shares: Tensor) -> Callable[[Tensor], Tensor]:
    """The classes of the nearest labelled cells by cosine, weighted by exp(cosine / 0.07). Same contract."""
    bank = F.normalize(features, dim=1)  # over c

    def classify(maps: Tensor) -> Tensor:
        votes = []
        for cells in rearrange(F.normalize(maps, dim=1), "b c h w -> b (h w) c"):  # one picture at a time
            cosine, neighbor = (cells @ bank.T).topk(min(NEIGHBORS, len(bank)), dim=1)  # over the bank
            weight = (cosine / NEIGHBOR_TEMPERATURE).softmax(dim=1)  # over i, the neighbours
            votes.append(einsum(weight, shares[neighbor], "n i, n i t -> n t"))
        return rearrange(torch.stack(votes), "b (h w) t -> b t h w", h=maps.shape[2])

    return classify
