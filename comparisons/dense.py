"""Pixel level: a place finds itself in the other view, among all places of all images.

Slide: "Image-level, pixel-level, and object-level contrastive learning", the middle column.
Papers: DenseCL (Wang et al., CVPR 2021), section 3.2; PixPro (Xie et al., CVPR 2021), section 3.1.
Differs: one positive, by geometry; all other places are negatives. DenseCL pairs the places whose
features are most alike, takes negatives from a queue of pooled vectors, and adds the image-level
loss with weight 1/2. PixPro has all places within 0.7 of a cell as positives; its final version
smooths one branch by feature similarity and has no negatives.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from backbone import Projector
from comparisons.common import PixelNetwork, Step, StudentTeacher, align, each_view
from grouping import overlapping
from losses import contrast_in_parts, unit

PLACES = 4  # [U] rows and columns of the shared part: closer places are too much alike


def place_contrast(query: Tensor, key: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Each place of the scene finds its own key among the places of all images.

    CE = mean_n -log softmax_m(<q_n, k_m> / temperature)_n, times 2 temperature

    query, key (b d h w): aligned, so that (h, w) is the same place in both; valid (b) bool: the
    crops overlap -> scalar, one direction.
    """
    query, key = (F.adaptive_avg_pool2d(maps, PLACES) for maps in (query, key))
    rows, keys = (unit(rearrange(x[valid], "b d h w -> (b h w) d")) for x in (query, key.detach()))
    if not len(rows):
        return 0 * query.sum()
    positives = torch.arange(len(rows), device=rows.device)
    return 2 * temperature * contrast_in_parts(rows, positives, keys, temperature) / len(rows)


class Dense(StudentTeacher):
    """Student, teacher and predictor of places."""

    make_student = PixelNetwork

    def make_predictor(self, dim: int, dim_hidden: int) -> nn.Module:
        """Of every place: (b d h w) -> (b d h w)."""
        return Projector(dim, dim_hidden, dim)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = contrast(q1, k2) + contrast(q2, k1), both at the places that the views share."""
        queries = [self.predictor(embeddings) for embeddings in each_view(self.student, views)]
        q1, q2 = align(queries, boxes, flipped)
        with torch.no_grad():
            k1, k2 = align(each_view(self.teacher, views), boxes, flipped)
        valid, tau = overlapping(boxes), self.temp_slot
        return place_contrast(q1, k2, valid, tau) + place_contrast(q2, k1, valid, tau), None
