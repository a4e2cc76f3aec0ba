"""Targets in which every prototype owns the same share of all pixels (SwAV).

Slide: "Towards semantic prototypes: deep clustering" (pseudo-labeling: Sinkhorn-Knopp).
Papers: Cuturi, 2013; SwAV (Caron et al., NeurIPS 2020), section 3.1, on pixels instead of images.
Differs: no queue, since a batch of pixels is large; no multi-crop; the prototypes have a gradient
from the first step on. It is the method without teacher and center: one network, two views.
"""

import torch
from einops import reduce
from torch import Tensor

from comparisons.common import Prototyped, Step, align, each_view, target_loss
from grouping import overlapping

TEMPERATURE = 0.05  # of the targets [P]


@torch.no_grad()
def sinkhorn(similarity: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Balanced targets: by turns every prototype and every pixel is scaled to the same sum.

    similarity (b k h w) -> assignment (b k h w), summing to 1 over k; over all pixels each
    prototype sums to nearly the same (Cuturi, 2013). Three iterations [P].
    """
    q = ((similarity - 1) / temperature).exp()  # only ratios matter; below 0.03 float32 underflows
    for _ in range(iterations):
        q = q / reduce(q, "b k h w -> 1 k 1 1", "sum")
        q = q / reduce(q, "b k h w -> b 1 h w", "sum")
    return q


class Sinkhorn(Prototyped):
    """One network: each view predicts the other's balanced targets."""

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = CE(s1, q2) + CE(s2, q1) with q = sinkhorn(s), which has no gradient."""
        maps = [similarity for _, similarity in each_view(self.network, views)]
        s1, s2 = align(maps, boxes, flipped)
        q1, q2 = (sinkhorn(aligned, TEMPERATURE) for aligned in (s1, s2))
        valid, tau = overlapping(boxes), self.temp_student
        return target_loss(s1, q2, tau, valid) + target_loss(s2, q1, tau, valid), None
