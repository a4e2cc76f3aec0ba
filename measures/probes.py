"""How well frozen features tell classes apart: a linear and a neighbor classifier per cell [U]."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from measures import metrics
from measures.datasets import Labeled
from measures.groups import table, winner
from measures.layouts import IGNORE, unlabeled
from measures.streams import Batches
from photometric import normalize

NEIGHBORS, NEIGHBOR_TEMPERATURE = 20, 0.07  # as in DINO's nearest-neighbor classifier

Classifier = Callable[[Tensor], Tensor]  # maps (b c h w) -> class scores (b t h w)


def check_parts(learned: Labeled, tested: Labeled) -> None:
    """Raises ValueError unless the parts have the same named classes and no image in common."""
    if not tested.class_names:
        raise ValueError("a probe learns classes; these segments have none: use segmentation")
    if learned.class_names != tested.class_names:
        one, other = (len(part.class_names) for part in (learned, tested))
        raise ValueError(f"{one} classes to learn and {other} to test: give --num-classes")
    # VOC's trainval; images/test of a folder without train, which learns from all
    if learned.files() & tested.files():
        raise ValueError("images to test on are among those to learn from: use another --split")


@torch.no_grad()
def collect_cells(
    backbone: nn.Module, batches: Batches, num_images: int, num_classes: int, most: int = 2**15
) -> tuple[Tensor, Tensor]:
    """Random labeled cells, as many of each image: features (n c), shares of the classes (n t)."""
    device, generator = next(backbone.parameters()).device, torch.Generator().manual_seed(0)
    features, shares = [], []
    for _, (images, label) in batches:
        maps = backbone(normalize(images.to(device)))
        known = F.one_hot(torch.where(label == IGNORE, num_classes, label), num_classes + 1)
        known = rearrange(known, "b y x t -> b t y x").float()
        share = F.adaptive_avg_pool2d(known, maps.shape[-2:])[:, :num_classes]
        rows = (rearrange(each.cpu(), "b c h w -> b (h w) c") for each in (maps, share))
        for cells, share_of in zip(*rows):
            kept = torch.randperm(len(cells), generator=generator)[: max(most // num_images, 1)]
            kept = kept[share_of[kept].sum(1) > 0]  # over t
            features.append(cells[kept])
            shares.append(F.normalize(share_of[kept], p=1, dim=1))  # over t
    if not sum(map(len, features)):
        raise unlabeled(f"the {num_images} labels to learn from")
    return torch.cat(features).float(), torch.cat(shares)


def linear_probe(features: Tensor, shares: Tensor, decay: float = 1e-4) -> Classifier:
    """Logistic regression from standardized features (n c) to shares (n t); decay: of weights."""
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)  # over n
    inputs = (features - mean) / std
    weight = inputs.new_zeros(inputs.shape[1], shares.shape[1]).requires_grad_()
    bias = inputs.new_zeros(shares.shape[1]).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(inputs @ weight + bias, shares)
        value = value + decay / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)

    def classify(maps: Tensor) -> Tensor:
        scaled = (maps - mean[:, None, None]) / std[:, None, None]
        scores = einsum(scaled, weight.detach(), "b c h w, c t -> b t h w")
        return scores + bias.detach()[:, None, None]

    return classify


def neighbor_probe(features: Tensor, shares: Tensor) -> Classifier:
    """The classes of the nearest labeled cells by cosine, weighted by exp(cosine / 0.07)."""
    bank = F.normalize(features, dim=1)  # over c

    def classify(maps: Tensor) -> Tensor:
        votes = []
        for cells in rearrange(F.normalize(maps, dim=1), "b c h w -> b (h w) c"):  # one image
            cosine, neighbor = (cells @ bank.T).topk(min(NEIGHBORS, len(bank)), dim=1)  # over bank
            weight = (cosine / NEIGHBOR_TEMPERATURE).softmax(dim=1)  # over i, the neighbors
            votes.append(einsum(weight, shares[neighbor], "n i, n i t -> n t"))
        return rearrange(torch.stack(votes), "b (h w) t -> b t h w", h=maps.shape[2])

    return classify


def probe(
    backbone: nn.Module, to_learn: Batches, num_images: int, to_test: Batches, names: Sequence[str]
) -> dict:
    """`metrics.known_scores` of both probes; names: of the classes; not_learned: those of tested
    classes without a label to learn from. Raises ValueError where there is no label at all.
    """
    t, device = len(names), next(backbone.parameters()).device
    cells = [each.to(device) for each in collect_cells(backbone, to_learn, num_images, t)]
    classifiers = dict(linear=linear_probe(*cells), neighbors=neighbor_probe(*cells))
    counts = {name: torch.zeros(t, t, dtype=torch.long) for name in classifiers}
    for _, (images, label) in to_test:
        with torch.no_grad():
            maps = backbone(normalize(images.to(device))).float()
        for name, classify in classifiers.items():
            guess = winner(classify(maps), label.shape[-2:]).cpu()
            counts[name] += metrics.confusion_matrix(guess, label, t, t)
    if not all(found.any() for found in counts.values()):
        raise unlabeled("the labels to test on")
    scores = {name: metrics.known_scores(found, names) for name, found in counts.items()}
    missing = (counts["linear"].sum(0) > 0) & (cells[1].sum(0).cpu() == 0)  # over t, n
    return dict(scores, not_learned=[name for name, m in zip(names, missing) if m])


def format_probes(result: Mapping[str, dict]) -> str:
    """The rows trained and random_backbone of a result as a table."""
    columns = [(kind, key) for kind in ("linear", "neighbors") for key in ("miou", "accuracy")]
    rows = {"trained": result["trained"], "random backbone": result["random_backbone"]}
    cells = {name: [f"{row[kind][key]:.3f}" for kind, key in columns] for name, row in rows.items()}
    names = dict(miou="mIoU", accuracy="acc.")
    return table(cells, [f"{kind} {names[key]}" for kind, key in columns])
