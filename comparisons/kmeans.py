"""Pseudo-labels by k-means: cluster the pixels, learn to predict the clusters, cluster again.

Slide: "Towards semantic prototypes: deep clustering" (pseudo-labeling: k-means).
Paper: DeepCluster (Caron et al., ECCV 2018), section 3, on pixels instead of images.
Differs: the labels of an epoch come from a copy of the network made when it began; the last batches
are clustered, not the whole data set; the classifier is the clusters' centers (as in PiCIE), where
DeepCluster starts a new linear layer; no balanced sampling. An empty cluster takes half of the
largest [P].
"""

from collections import deque
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from comparisons.common import Prototyped, Step, target_loss
from losses import unit
from teacher import make_teacher, update_teacher

EPOCH = 48  # [U] steps between two clusterings: an epoch of the toy preset
BATCHES = 8  # [U] the last views, whose pixels are clustered
PIXELS = 8192  # [U] the most pixels that are clustered


def cluster(rows: Tensor, k: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """k-means (Lloyd) from k of the rows (n d) -> centers (k d)."""
    centers = rows[torch.randperm(len(rows), generator=generator)[:k]].clone()
    for _ in range(rounds):
        nearest = nearest_center(rows, centers)
        counts = torch.bincount(nearest, minlength=k)
        for empty in (counts == 0).nonzero()[:, 0].tolist():
            members = (nearest == counts.argmax()).nonzero()[:, 0]
            nearest[members[::2]] = empty  # over n: every other row of the largest cluster
            counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centers).index_add_(0, nearest, rows)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centers)
    return centers


def nearest_center(rows: Tensor, centers: Tensor) -> Tensor:
    """rows (n d), centers (k d) -> the index of the nearest one by distance (n)."""
    return (rows @ centers.T - centers.square().sum(1) / 2).argmax(1)  # over d; over k


class Kmeans(Prototyped):
    """A network that learns, and the copy of it that labels. seed: of the clusters."""

    wraps = Prototyped

    def __init__(self, seed: int = 0, **settings: Any):
        super().__init__(**settings)
        self.network.prototypes.requires_grad_(False)  # they are the centers of the clusters
        self.labeler = make_teacher(self.network)
        self.steps = 0
        self.recent: deque[Tensor] = deque(maxlen=BATCHES)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = mean_v CE(s_v, y_v), each view alone; y_v: the nearest center for the copy."""
        self.start(views)
        images = rearrange(views, "b v c y x -> (b v) c y x")
        _, similarity = self.network(images)
        labels = self.labeler(images)[1].argmax(1)  # over k; labels have no gradient
        valid = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return target_loss(similarity, labels, self.temp_student, valid), views

    def start(self, views: Tensor) -> None:
        """Before the first step, cluster its views (b v 3 y x)."""
        if not self.recent:
            self.recent.append(views)
            self.reassign()

    @torch.no_grad()
    def reassign(self) -> None:
        """A new epoch: copy the network, and cluster its embeddings of the last views."""
        update_teacher(self.labeler, self.network, momentum=0.0)
        images = [rearrange(views, "b v c y x -> (b v) c y x") for views in self.recent]
        pixels = torch.cat([self.labeler.embed(some)[1] for some in images])
        rows = unit(rearrange(pixels, "b d h w -> (b h w) d"))
        some = torch.randperm(len(rows), generator=self.generator)[:PIXELS].to(rows.device)
        centers = cluster(rows[some], len(self.network.prototypes.weight), self.generator)
        for network in (self.network, self.labeler):
            network.prototypes.weight.copy_(centers)

    def after_step(self, memo: Tensor, momentum: float) -> None:
        """memo: the views of this step. At the end of an epoch the labels change."""
        self.recent.append(memo)
        self.steps += 1
        if self.steps % EPOCH == 0:
            self.reassign()
