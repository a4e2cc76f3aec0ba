"""Centering and sharpening alone: the teacher labels, the student predicts, no slot is contrasted.

Slide: "Towards semantic prototypes: deep clustering" (self-distillation, stop-gradient, centering
and sharpening). Papers: DINO (Caron et al., ICCV 2021), on pixels; SlotCon's table 6b, weight 1.
Differs: DINO warms the teacher's temperature up, uses more than two views, and its prototypes are
the rows of a linear layer without gradient in the first epoch. Three of the four ways not to
collapse are numbers of the configuration (recipes.py, table "collapse"); the fourth stands here.
Read next: slotcon.py of this folder.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from comparisons.common import Outcome, overlapping
from comparisons.slotcon import WholeMethod
from grouping import assignment


def both_branches(
    first: Tensor,
    second: Tensor,
    center: Tensor,
    temp_student: float,
    temp_teacher: float,
    valid: Tensor,
) -> Tensor:
    """`losses.group_consistency` without stop-gradient: the target is moved by the loss as well.

    first, second (b k h w): aligned similarity maps; center (k); valid (b) bool -> scalar.
    """
    target = assignment(second - rearrange(center, "k -> k 1 1"), temp_teacher)
    logs = (first / temp_student).log_softmax(dim=1)  # over k
    entropy = reduce(-target * logs, "b k h w -> b h w", "sum")
    entropy = reduce(entropy, "b h w -> b", "mean")
    return torch.where(valid, entropy, 0 * entropy).sum() / valid.sum().clamp(min=1)


class SelfDistillation(WholeMethod):
    """SlotCon without the slot loss. stop_gradient=False: the student labels, with gradient.

    settings: of `slotcon.SlotCon`, except for the group weight, which is 1.
    """

    def __init__(self, stop_gradient: bool = True, momentum_center: float = 0.9, **settings: Any):
        super().__init__(momentum_center, **{**settings, "group_weight": 1.0})
        self.stop_gradient = stop_gradient

    def forward(
        self, views: Tensor, boxes: Tensor, flipped: Tensor, told: Tensor
    ) -> tuple[Tensor, Outcome]:
        """L = CE(s1, t2) + CE(s2, t1); without stop-gradient t is the student itself."""
        if self.stop_gradient:
            return super().forward(views, boxes, flipped, told)
        method = self.method
        one, two = method.look(method.student, views, boxes, flipped)
        temperatures, valid = (method.temp_student, method.temp_teacher), overlapping(boxes)
        loss = both_branches(
            one.aligned, two.aligned, method.center, *temperatures, valid
        ) + both_branches(two.aligned, one.aligned, method.center, *temperatures, valid)
        center_mean = reduce([one.similarity, two.similarity], "v b k h w -> k", "mean").detach()
        return loss, Outcome(loss.detach(), center_mean)
