"""Is it learning? What one line of the log says about a step; docs/training.md has the glossary.

Slide: "Statistics about the slots" (figure 4, occupied slots during training).
Paper: section 4.4.
Differs: the released code logs the sum of the losses only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from engine.ranks import rank_and_world_size, sum_over_ranks
from grouping import assignment
from slotcon import Report


@torch.no_grad()
def statistics(report: Report, center: Tensor, temp_teacher: float) -> dict[str, float]:
    """Numbers over the images of all ranks, for the log. Waits for the device.

    report: of this rank's forward; center (k); temp_teacher: of the teacher's assignment.
    """
    world_size = rank_and_world_size()[1]
    teacher_occupied = torch.stack([view.occupied for view in report.teacher])
    v, b, _ = teacher_occupied.shape
    maps = rearrange([view.similarity for view in report.teacher], "v b k h w -> (v b) k h w")
    p = assignment(maps - center[:, None, None], temp_teacher)
    mean = sum_over_ranks(reduce(p, "b k h w -> k", "mean")) / world_size
    pairs = zip(report.student, reversed(report.teacher))  # (s1, t2), (s2, t1)
    same = [
        student.aligned.argmax(1) == teacher.aligned.argmax(1) for student, teacher in pairs
    ]  # over k
    same = reduce(torch.stack(same).float(), "v b h w -> b", "mean")
    sums = sum_over_ranks(
        torch.stack(
            [
                teacher_occupied.sum() / (v * b),
                reduce(torch.special.entr(p), "b k h w -> b h w", "sum").mean(),
                (same * report.valid).sum(),
                report.valid.sum(),
            ]
        ).float()
    )
    used = sum_over_ranks(reduce(teacher_occupied.long(), "v b k -> k", "sum")) > 0
    return dict(
        occupied_per_image=sums[0].item() / world_size,
        prototypes_used=int(used.sum()),
        entropy_teacher=sums[1].item() / world_size,
        entropy_mean=torch.special.entr(mean).sum().item(),
        agreement=(sums[2] / sums[3].clamp(min=1)).item(),
    )


def brief(record: Mapping[str, Any]) -> str:
    """A line of the log for the eye."""
    return (
        f"loss {record['loss']:.3f} (group {record['group_loss']:.3f}, slot "
        f"{record['slot_loss']:.3f})  occupied {record['occupied_per_image']:.1f}  in use "
        f"{record['prototypes_used']}  agreement {record['agreement']:.2f}  "
        f"{record['images_per_second']:.0f} images/s"
    )
