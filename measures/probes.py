"""How well frozen features tell classes apart: a linear and a nearest-neighbor classifier per cell.

Slide: none; the common way to judge features without fine-tuning.
Paper: none.
Differs: ours [U].

Both classifiers learn from cells of the feature map. The label of a cell is the mixture of classes
that it covers. One pass over the labeled images serves both classifiers, and memory does not grow
with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from measures import metrics
from measures.grouping_report import by_class
from measures.labels import Labeled
from measures.metrics import IGNORE
from measures.segments import winner
from photometric import normalize

NEIGHBORS, NEIGHBOR_TEMPERATURE = 20, 0.07  # as in DINO's nearest-neighbor classifier

Classifier = Callable[[Tensor], Tensor]  # maps (b c h w) -> class scores (b t h w)
LabeledBatches = Iterable[tuple[Tensor, tuple[Tensor, Tensor]]]  # indices, (images, label)


def check_parts(learned: Labeled, tested: Labeled) -> None:
    """Raises ValueError unless both parts of a data set have the same named classes."""
    if not tested.class_names:
        raise ValueError("a probe learns classes, and the segments of this data set have no names: "
                         "measure them with the subcommand segmentation")
    if learned.class_names != tested.class_names:
        raise ValueError(f"the split train has {len(learned.class_names)} classes and the one to "
                         f"test on {len(tested.class_names)}: give the number of classes by "
                         "--num-classes or classes.txt")


def pick_at_random(labeled: Labeled, count: int, seed: int = 0) -> Labeled:
    """`count` random images in their old order; 0: all."""
    if not count:
        return labeled
    order = torch.randperm(len(labeled), generator=torch.Generator().manual_seed(seed))
    return labeled.subset(order[:count].sort().values.tolist())


@torch.no_grad()
def collect_cells(
    backbone: nn.Module, batches: LabeledBatches, num_images: int, num_classes: int,
    most: int = 32_768,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cells of the frozen map with what they show: features (n c), shares of the classes (n t).

    batches of (indices, (images (b 3 y x), label (b y x))). Shares sum to 1. Each image gives the
    same number of random cells, so that at most `most` are kept however many images there are;
    cells without a labeled pixel are dropped. Raises ValueError if none is left.
    """
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    features, shares = [], []
    for _, (images, label) in batches:
        maps = backbone(normalize(images.to(device)))
        h, w = maps.shape[-2:]
        known = F.one_hot(torch.where(label == IGNORE, num_classes, label), num_classes + 1)
        known = rearrange(known, "b y x t -> b t y x").float()
        share = F.adaptive_avg_pool2d(known, (h, w))[:, :num_classes]
        for cells, share_of in zip(rearrange(maps, "b c h w -> b (h w) c").cpu(),
                                   rearrange(share, "b t h w -> b (h w) t")):
            kept = torch.randperm(h * w, generator=generator)[: max(most // num_images, 1)]
            kept = kept[share_of[kept].sum(1) > 0]  # over t
            features.append(cells[kept])
            shares.append(F.normalize(share_of[kept], p=1, dim=1))  # over t
        if sum(map(len, features)) >= most:
            break
    if not sum(map(len, features)):
        raise ValueError(f"nothing is labeled: all pixels of the {num_images} labels to learn from "
                         f"are {IGNORE} (no class)")
    return torch.cat(features).float()[:most], torch.cat(shares)[:most]


def linear_probe(features: Tensor, shares: Tensor, decay: float = 1e-4) -> Classifier:
    """Logistic regression from standardized features: a 1x1 convolution.

    features (n c), shares (n t) -> a function: maps (b c h w) -> class scores (b t h w). The
    problem is convex, so there is no learning rate to choose.
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)  # over n
    inputs = (features - mean) / std
    weight = torch.zeros(inputs.shape[1], shares.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(shares.shape[1], device=inputs.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = inputs @ weight + bias
        value = F.cross_entropy(logits, shares) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)

    def classify(maps: Tensor) -> Tensor:
        scaled = (maps - mean[:, None, None]) / std[:, None, None]
        scores = einsum(scaled, weight.detach(), "b c h w, c t -> b t h w")
        return scores + bias.detach()[:, None, None]

    return classify


def neighbor_probe(features: Tensor, shares: Tensor) -> Classifier:
    """The classes of the nearest labeled cells by cosine, weighted by exp(cosine / 0.07).

    Arguments and result as of `linear_probe`.
    """
    bank = F.normalize(features, dim=1)  # over c

    def classify(maps: Tensor) -> Tensor:
        votes = []
        for cells in rearrange(F.normalize(maps, dim=1), "b c h w -> b (h w) c"):  # one image
            cosine, neighbor = (cells @ bank.T).topk(min(NEIGHBORS, len(bank)), dim=1)  # over bank
            weight = (cosine / NEIGHBOR_TEMPERATURE).softmax(dim=1)  # over i, the neighbors
            votes.append(einsum(weight, shares[neighbor], "n i, n i t -> n t"))
        return rearrange(torch.stack(votes), "b (h w) t -> b t h w", h=maps.shape[2])

    return classify


@torch.no_grad()
def score_probes(
    backbone: nn.Module, classifiers: dict[str, Classifier], batches: LabeledBatches,
    class_names: Sequence[str],
) -> dict:  # fmt: skip
    """mIoU and accuracy of each classifier, its scores enlarged to the label.

    batches as in `collect_cells`. Raises ValueError where nothing is labeled.
    """
    t, device = len(class_names), next(backbone.parameters()).device
    counts = {name: torch.zeros(t, t, dtype=torch.long) for name in classifiers}
    for _, (images, label) in batches:
        maps = backbone(normalize(images.to(device))).float()
        for name, classify in classifiers.items():
            guess = winner(classify(maps), label.shape[-2:]).cpu()
            counts[name] += metrics.confusion_matrix(guess, label, t, t)
    if not all(table.any() for table in counts.values()):
        raise ValueError(f"nothing is labeled: all pixels of the labels to test on are {IGNORE} "
                         "(no class)")
    own = torch.arange(t)  # a probe's class t is class t: there is nothing to match
    return {name: dict(miou=metrics.miou(table, own), accuracy=metrics.pixel_accuracy(table, own),
                       iou=by_class(class_names, metrics.iou(table, own)))
            for name, table in counts.items()}  # fmt: skip


def probe(
    backbone: nn.Module, to_learn: LabeledBatches, num_images: int, to_test: LabeledBatches,
    class_names: Sequence[str],
) -> dict:  # fmt: skip
    """Both probes learned and tested: `score_probes` under the keys linear and neighbors."""
    device = next(backbone.parameters()).device
    cells = collect_cells(backbone, to_learn, num_images, len(class_names))
    features, shares = (each.to(device) for each in cells)
    classifiers = dict(linear=linear_probe(features, shares),
                       neighbors=neighbor_probe(features, shares))
    return score_probes(backbone, classifiers, to_test, class_names)


def format_probes(result: dict) -> str:
    """The rows trained and random_backbone of a result as a table."""
    lines = [f"{'':<18}linear mIoU    accuracy   neighbors mIoU    accuracy"]
    for row in ("trained", "random_backbone"):
        linear, near = result[row]["linear"], result[row]["neighbors"]
        lines.append(f"{row.replace('_', ' '):<18}{linear['miou']:>11.3f}"
                     f"{linear['accuracy']:>12.3f}{near['miou']:>17.3f}{near['accuracy']:>12.3f}")
    return "\n".join(lines)
