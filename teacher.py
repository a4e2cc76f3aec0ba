"""The teacher is a moving average of the student; no gradient reaches it.

Slide: "Towards semantic prototypes: deep clustering" (self-distillation, stop-gradient).
Paper: section 3.3.
Differs: nothing known. The average covers parameters only. The teacher's batch norms stay in
training mode and keep running statistics of their own, as in the released code.
Read next: slotcon.py.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student without gradient, in training mode [O]: it normalizes with batch
    statistics.
    """
    return copy.deepcopy(student).requires_grad_(False).train()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student: all parameters in one launch, in place;
    no buffers.

    momentum in [0, 1]: 1 keeps the teacher, 0 copies the student. Raises ValueError outside.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"the teacher's momentum must lie in [0, 1], found {momentum}")
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def teacher_momentum(step: int, total_steps: int, start: float = 0.99, end: float = 1.0) -> float:
    """end - (end - start) (cos(pi step / total_steps) + 1) / 2: from 0.99 to 1 over all optimizer
    steps [O].

    Raises ValueError for a run without steps or a momentum outside [0, 1].
    """
    if total_steps < 1 or not 0 <= start <= 1 or not 0 <= end <= 1:
        raise ValueError(
            f"expected total_steps >= 1, start and end in [0, 1], found {total_steps}, {start}, "
            f"{end}"
        )
    return end - (end - start) * (math.cos(math.pi * step / total_steps) + 1) / 2
