"""Object level with a prior: the contrast of groups, where the groups are given and not learned.

Slide: "Image-level, pixel-level, and object-level contrastive learning", the right column; table
2's column "Obj. Prior".
Paper: DetCon (Henaff et al., ICCV 2021), section 3.
Differs: the contrast is SlotCon's; DetCon samples 16 masks per image and leaves the other masks of
the same image out of the negatives. The masks: `grid`, three by three squares (DetCon's "spatial
heuristic"); `color`, clusters of the colors of each scene (its Felzenszwalb segments); `truth`,
every object and both kinds of stuff as they were drawn, the upper bound.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from comparisons.common import PixelNetwork, Step, StudentTeacher, each_view
from comparisons.kmeans import cluster, nearest_center
from comparisons.slot_attention import weighted_mean
from losses import pair_slots, slot_contrast

MASKS = 9  # of each scene, at most: seven objects and two kinds of stuff, or three by three squares


def pool_in_masks(embeddings: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """One vector per mask: the mean of the embeddings under it.

    embeddings (b d h w); masks (b k y x) in 0..1 -> slots (b k d), and which masks cover at least
    one cell of the map (b k) bool.
    """
    cover = F.adaptive_avg_pool2d(masks, embeddings.shape[-2:])
    pixels = rearrange(embeddings, "b d h w -> b (h w) d")
    slots = weighted_mean(rearrange(cover, "b k h w -> b k (h w)"), pixels)
    return slots, reduce(cover, "b k h w -> b k", "sum") >= 1


def color_clusters(image: Tensor) -> Tensor:
    """image (3 y x) uint8 -> the number of each pixel's color cluster (y x), one of MASKS."""
    _, y, x = image.shape
    rows = rearrange(image, "c y x -> (y x) c").float()
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(rows), generator=generator)[:512]
    centers = cluster(rows[some], MASKS, generator, rounds=8)
    return nearest_center(rows, centers).reshape(y, x)


class GivenMasks(StudentTeacher):
    """Student, teacher and predictor of masks. masks: "grid", "color" or "truth"."""

    make_student = PixelNetwork
    wraps = StudentTeacher

    def __init__(self, masks: str = "truth", **settings: Any):
        super().__init__(**settings)
        self.extra = masks

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = contrast(s1, t2) + contrast(s2, t1); extra (b v k y x): masks, cut like the views."""
        masks = extra.unbind(1)  # over v
        (s1, seen1), (s2, seen2) = map(pool_in_masks, each_view(self.student, views), masks)
        with torch.no_grad():
            (t1, _), (t2, _) = map(pool_in_masks, each_view(self.teacher, views), masks)
        pairs12, pairs21 = pair_slots([seen1, seen2], [seen2, seen1])
        loss12 = slot_contrast(s1, t2, self.predictor, pairs12, self.temp_slot)
        loss21 = slot_contrast(s2, t1, self.predictor, pairs21, self.temp_slot)
        return loss12 + loss21, None
