"""Image level: an image finds its other view among all images of the batch (MoCo v3).

Slide: "Image-level, pixel-level, and object-level contrastive learning", the left column.
Paper: MoCo v3 (Chen, Xie, He, ICCV 2021), algorithm 1.
Differs: a convolutional backbone; our projector and predictor; the temperature is SlotCon's 0.2,
which is MoCo v3's too. It makes no groups: clusters of its backbone's features are measured.
"""

import torch
from einops import reduce
from torch import Tensor, nn

from backbone import build_backbone
from comparisons.common import Step, StudentTeacher, each_view
from losses import image_contrast
from slots import SlotPredictor


class ImageNetwork(nn.Module):
    """Backbone, mean over all places, projector: images (b 3 y x) -> one vector per image (b d)."""

    def __init__(self, arch: str, dim_hidden: int, dim_out: int):
        super().__init__()
        self.backbone = build_backbone(arch)
        self.projector = SlotPredictor(self.backbone.out_channels, dim_out, dim_hidden)

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> (b d)."""
        return self.projector(reduce(self.backbone(images), "b c h w -> b c", "mean"))


class Moco(StudentTeacher):
    """Student, teacher and predictor of whole images."""

    make_student = ImageNetwork

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = contrast(q1, k2) + contrast(q2, k1); contrast = 2 tau CE(<q_b, k_m> / tau, m = b)."""
        q1, q2 = (self.predictor(vectors) for vectors in each_view(self.student, views))
        with torch.no_grad():
            k1, k2 = each_view(self.teacher, views)
        return image_contrast(q1, k2, self.temp_slot) + image_contrast(q2, k1, self.temp_slot), None
