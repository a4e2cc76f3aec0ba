"""k-means pseudo-labels that both views must agree on: invariance to color, equivariance to place.

Slide: "Deep clustering on pixels: unsupervised semantic seg." (PiCIE).
Paper: Cho et al., CVPR 2021, section 3, equations 3 to 6.
Differs: one clustering serves both views, where PiCIE makes one of each; the labels come from the
copy that kmeans.py describes, not from a pass over the whole data set. There is no second head of
more clusters (the "+ H." of table 5).
"""

from torch import Tensor

from comparisons.common import Step, align, each_view, target_loss
from comparisons.kmeans import Kmeans
from grouping import overlapping


class Picie(Kmeans):
    """kmeans.py with labels that cross from view to view. Arguments as there."""

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = (CE(s1, y1) + CE(s2, y2) + CE(s1, y2) + CE(s2, y1)) / 4, where both views show."""
        self.start(views)
        maps = [similarity for _, similarity in each_view(self.network, views)]
        teaching = [similarity for _, similarity in each_view(self.labeler, views)]
        s1, s2 = align(maps, boxes, flipped)
        y1, y2 = (similarity.argmax(1) for similarity in align(teaching, boxes, flipped))  # over k
        valid = overlapping(boxes)
        pairs = ((s1, y1), (s2, y2), (s1, y2), (s2, y1))
        return sum(target_loss(s, y, self.temp_student, valid) for s, y in pairs) / 4, views
