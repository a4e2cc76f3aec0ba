"""Centering and sharpening alone: the teacher labels, the student predicts, no slot is contrasted.

Slide: "Towards semantic prototypes: deep clustering" (self-distillation, stop-gradient, centering
and sharpening).
Papers: DINO (Caron et al., ICCV 2021), on pixels; SlotCon's table 6b, weight 1.
Differs: DINO warms the teacher's temperature up, uses more than two views, and its prototypes are
the rows of a linear layer without gradient in the first epoch. Three of the four ways not to
collapse are numbers of the configuration (recipes.py, table "collapse"); the fourth is here.
"""

from typing import Any

from einops import rearrange
from torch import Tensor

from comparisons.common import Step, align, each_view, target_loss
from comparisons.whole_method import WholeMethod
from grouping import assignment, overlapping
from losses import mean_over_pixels


def both_branches(
    first: Tensor,
    second: Tensor,
    center: Tensor,
    temp_student: float,
    temp_teacher: float,
    valid: Tensor,
) -> Tensor:
    """`losses.group_consistency` without stop-gradient: the loss moves the target as well.

    first, second (b k h w): aligned similarity maps; center (k); valid (b) bool -> scalar.
    """
    target = assignment(second - rearrange(center, "k -> k 1 1"), temp_teacher)
    return target_loss(first, target, temp_student, valid)


class SelfDistillation(WholeMethod):
    """SlotCon without the slot loss. stop_gradient=False: the student labels, with gradient."""

    def __init__(self, stop_gradient: bool = True, momentum_center: float = 0.9, **settings: Any):
        super().__init__(momentum_center, **{**settings, "group_weight": 1.0})
        self.stop_gradient = stop_gradient

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = CE(s1, t2) + CE(s2, t1); without stop-gradient t is the student itself."""
        if self.stop_gradient:
            return super().forward(views, boxes, flipped, extra)
        method = self.method
        maps = [similarity for _, similarity in each_view(method.student, views)]
        s1, s2 = align(maps, boxes, flipped)
        numbers = method.center, method.temp_student, method.temp_teacher, overlapping(boxes)
        loss = both_branches(s1, s2, *numbers) + both_branches(s2, s1, *numbers)
        return loss, mean_over_pixels(maps)
