"""A new start of the groups: new prototypes for a backbone that has learned.

Slide: "Semantic grouping with pixel-level deep clustering".
Paper: none.
Differs: ours [U], for toy scenes; the released code has one start, and so has every preset but
`toy`. Two classes that look alike to an untrained backbone begin with one prototype. The projector
then learns to give them one embedding, so they stay together, although the backbone learns to tell
them apart (benchmarks/toy.md). Projector, predictor and prototypes are therefore drawn anew, and
prototypes start where the backbone's features form clusters.
Read next: train.py, which does it `--group-starts` times.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from backbone import Projector
from engine.ranks import copy_from_main
from slotcon import SlotCon
from slots import SlotPredictor

TRIALS = 10  # of k-means; the best is taken
MOST_ROWS = 20_000  # pixels that k-means looks at
SHRINKAGE = 0.1  # added to the noise in every direction, in units of its mean


@torch.no_grad()
def start_groups_anew(
    model: SlotCon, optimizer: torch.optim.Optimizer, images: Tensor, count: int, seed: int
) -> None:
    """Draw projector, predictor and prototypes of the model anew, for student and teacher alike;
    the backbones stay. All ranks call it.

    images (b 3 y x) normalized, whole scenes: what the clusters are found in; count: clusters; the
    projector's last layer is solved so that the pixels of cluster i point at prototype i;
    optimizer: forgets what it knows of the weights that are drawn. A function of the model, the
    images and the seed. Raises ValueError where count exceeds k.
    """
    student, teacher = model.student, model.teacher
    k = len(student.prototypes.weight)
    if count > k:
        raise ValueError(f"{count} clusters need as many prototypes, found {k}")
    _draw_anew(model, seed)
    features = teacher.backbone.eval()(images)
    teacher.backbone.train()
    own = rearrange(clusters(features, count, seed), "b h w -> (b h w)").to(images.device)
    prototypes = F.normalize(teacher.prototypes.weight, dim=1)  # over d
    hidden = rearrange(_hidden(teacher.projector, features), "b c h w -> (b h w) c")
    weight, bias = least_squares(hidden, prototypes[own])
    last = teacher.projector.mlp[-1]
    last.weight.copy_(rearrange(weight, "d c -> d c 1 1"))
    last.bias.copy_(bias)
    z = F.normalize(hidden @ weight.T + bias, dim=1)  # over d
    model.center.copy_((z @ prototypes.T).mean(dim=0))  # over the pixels
    # The clusters of two ranks may differ by a rounding
    copy_from_main([model.center, *teacher.projector.parameters()])
    student.projector.load_state_dict(teacher.projector.state_dict())
    student.prototypes.load_state_dict(teacher.prototypes.state_dict())
    for module in (student.projector, student.prototypes, model.predictor):
        for p in module.parameters() if module else ():
            optimizer.state.pop(p, None)


def clusters(features: Tensor, count: int, seed: int) -> Tensor:
    """Which cluster each pixel belongs to: k-means++ from several starts, a function of the seed.

    features (b c h w), h and w at least 3; count: clusters -> (b h w) int64 in 0..count-1. k-means
    takes all differences for equally important, so they are first measured in units of
    `neighbor_noise`; then every pixel is given length 1. Raises ValueError where there are fewer
    pixels than clusters.
    """
    b, _, h, w = features.shape
    if b * h * w < count:
        raise ValueError(f"{count} clusters need as many pixels, found {b * h * w}")
    maps = features.double().cpu()
    maps = maps - maps.mean(dim=(0, 2, 3), keepdim=True)  # over b, h, w
    maps = maps / maps.std(dim=(0, 2, 3), correction=0, keepdim=True).clamp(min=1e-9)
    variance, axes = torch.linalg.eigh(neighbor_noise(maps))
    units = (variance + SHRINKAGE * variance.mean()).clamp(min=1e-9).sqrt()
    rows = rearrange(maps, "b c h w -> (b h w) c") @ axes / units
    rows = F.normalize(rows, dim=1)  # over c
    rng = np.random.default_rng(seed)
    some = rows[rng.permutation(len(rows))[:MOST_ROWS]]
    trials = [_kmeans(some, count, rng) for _ in range(TRIALS)]
    best = min(trials, key=lambda centers: float(_nearest(some, centers)[0].sum()))
    return rearrange(_nearest(rows, best)[1], "(b h w) -> b h w", b=b, h=h, w=w)


def neighbor_noise(maps: Tensor) -> Tensor:
    """How features vary within one thing: maps (b c h w) -> covariance (c c).

    Of the differences between pixels two cells apart, the smaller half: most neighbors belong to
    one thing, and those that do not differ more. Linear discriminant analysis measures in these
    units, given the classes; here the neighborhood stands for the class.
    """
    across = maps[:, :, :, 2:] - maps[:, :, :, :-2]
    down = maps[:, :, 2:] - maps[:, :, :-2]
    differences = torch.cat([rearrange(x, "b c h w -> (b h w) c") for x in (across, down)])
    lengths = differences.norm(dim=1)  # over c
    same = differences[lengths <= lengths.median()]
    return same.T @ same / len(same)


def least_squares(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer that comes closest: inputs (n c), targets (n d) -> weight (d c), bias (d)
    with the least sum of |weight input + bias - target|^2.
    """
    offset = targets.mean(dim=0)  # over n
    centered = inputs - inputs.mean(dim=0)
    solved = torch.linalg.lstsq(centered.double(), (targets - offset).double()).solution
    weight = rearrange(solved, "c d -> d c").to(inputs)
    return weight, offset - weight @ inputs.mean(dim=0)


def _hidden(projector: Projector, features: Tensor) -> Tensor:
    """What the last layer sees, by batch statistics as in training; they become the running
    statistics at once, so that the network can be evaluated from here on.
    """
    norms = [layer for layer in projector.mlp if hasattr(layer, "running_mean")]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    hidden = projector.mlp[:-1](features)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return hidden


def _kmeans(rows: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    with warnings.catch_warnings():
        # An empty cluster keeps its center, and of equal pixels any is a center: no harm in either.
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        warnings.filterwarnings("ignore", "invalid value encountered in divide")
        centers, _ = kmeans2(rows.numpy(), count, minit="++", rng=rng, iter=20)
    return torch.from_numpy(centers)


def _nearest(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest center, and which it is."""
    distance, index = torch.cdist(rows, centers).min(dim=1)  # over the centers
    return distance, index


def _draw_anew(model: SlotCon, seed: int) -> None:
    """New random weights for the teacher and the predictor, the same on every rank."""
    teacher, predictor = model.teacher, model.predictor
    k, d = teacher.prototypes.weight.shape
    width, channels = teacher.projector.mlp[0].weight.shape[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher.projector.load_state_dict(Projector(channels, width, d).state_dict())
        teacher.prototypes.load_state_dict(nn.Embedding(k, d).state_dict())
        if predictor is not None:
            predictor.load_state_dict(SlotPredictor(d, d, width).state_dict())
