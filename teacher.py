"""The teacher is a moving average of the student; no gradient reaches it.

Slide: "Towards semantic prototypes: deep clustering" (self-distillation, stop-gradient).
Paper: section 3.3.
Read next: slotcon.py.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy without gradient that normalizes with batch statistics, in training mode [O]."""
    return copy.deepcopy(student).requires_grad_(False).train()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """All parameters in place; no buffers [O].

    teacher <- momentum teacher + (1 - momentum) student

    Raises ValueError for a momentum outside [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"the teacher's momentum must lie in [0, 1], found {momentum}")
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def teacher_momentum(step: int, total_steps: int, start: float = 0.99, end: float = 1.0) -> float:
    """A half cosine from start to end over all optimizer steps [O].

    momentum = end - (end - start) (cos(pi step / total_steps) + 1) / 2

    Raises ValueError for a run without steps and for a momentum outside [0, 1].
    """
    if total_steps < 1 or not 0 <= start <= 1 or not 0 <= end <= 1:
        given = f"{total_steps}, {start}, {end}"
        raise ValueError(f"expected total_steps >= 1, start and end in [0, 1], found {given}")
    return end - (end - start) * (math.cos(math.pi * step / total_steps) + 1) / 2
