"""k-means pseudo-labels that both views must agree on: invariance to color, equivariance to place.

Slide: "Deep clustering on pixels: unsupervised semantic seg." (PiCIE).
Paper: Cho et al., CVPR 2021, section 3, equations 3 to 6.
Differs: one clustering serves both views, where PiCIE makes one of each; the labels are of the copy
that kmeans.py describes, not of a pass over the whole data set. Without PiCIE's second head of more
clusters (the "+ H." of table 5).
Read next: sinkhorn.py.
"""

from __future__ import annotations

from torch import Tensor

from comparisons.common import Outcome, each_view, overlapping, target_loss
from comparisons.kmeans import Kmeans
from grouping import inverse_augmentation


class Picie(Kmeans):
    """kmeans.py with labels that cross from view to view. Arguments as there."""

    def forward(
        self, views: Tensor, boxes: Tensor, flipped: Tensor, told: Tensor
    ) -> tuple[Tensor, Outcome]:
        """L = within + across = CE(s1, y1) + CE(s2, y2) + CE(s1, y2) + CE(s2, y1), divided by 4,
        all at the places that both views show."""
        if not self.recent:
            self.recent.append(views)
            self.reassign()

        def align(maps: list[Tensor]) -> list[Tensor]:
            return [inverse_augmentation(maps[i], boxes[:, i], flipped[:, i]) for i in (0, 1)]

        s1, s2 = align([similarity for _, similarity in each_view(self.network, views)])
        labels = align([similarity for _, similarity in each_view(self.labeler, views)])
        y1, y2 = (similarity.argmax(1) for similarity in labels)  # over k
        valid = overlapping(boxes)
        within, across = ((s1, y1), (s2, y2)), ((s1, y2), (s2, y1))
        loss = sum(target_loss(s, y, self.temp_student, valid) for s, y in within + across) / 4
        return loss, Outcome(loss.detach(), views)
