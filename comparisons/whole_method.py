"""The method itself, behind the interface of this folder.

Slide: "Together: solving segmentation & representation jointly".
Paper: section 3.
Differs: nothing known from the top-level slotcon.py, which it calls.
"""

from typing import Any

from torch import Tensor

from comparisons.common import Step, System
from slotcon import SlotCon


class WholeMethod(System):
    """SlotCon, its center and its teacher. settings: of `slotcon.SlotCon`."""

    wraps = SlotCon
    judged = "method.teacher"

    def __init__(self, momentum_center: float = 0.9, **settings: Any):
        super().__init__()
        self.method = SlotCon(**settings)
        self.momentum_center = momentum_center

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = lambda (consistency of both directions) + (1 - lambda) (contrast of both)."""
        loss, report = self.method(views, boxes, flipped)
        return loss, report.center_mean

    def after_step(self, memo: Tensor, momentum: float) -> None:
        """memo: the mean teacher similarity (k)."""
        self.method.update_center(memo, self.momentum_center)
        self.method.update_teacher(momentum)

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> the teacher's similarity with its prototypes (b k h w)."""
        return self.method.teacher(images)[1]
