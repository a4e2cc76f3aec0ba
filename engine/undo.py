"""A step with bad numbers must leave no trace: what its forward has touched returns, bit for bit.

Slide: none.
Paper: none.
Differs: not in the released code.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Undo:
    """Copies of tensors that a forward changes, such as the statistics of batch norms; all in one
    launch per type.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        tensors = list(tensors)
        # A list of one type is copied in one launch, so sums are kept apart from whole-number
        # counts. An empty list is none: torch refuses it.
        types = dict.fromkeys(t.dtype for t in tensors)
        self.now = [[t for t in tensors if t.dtype == dtype] for dtype in types]
        self.before = [[t.clone() for t in group] for group in self.now]
        self.armed = False  # whether a step is under way

    @torch.no_grad()
    def remember(self) -> None:
        """Before the forward."""
        for before, now in zip(self.before, self.now):
            torch._foreach_copy_(before, now)
        self.armed = True

    def forget(self) -> None:
        """The step counts."""
        self.armed = False

    @torch.no_grad()
    def undo(self) -> None:
        """Return to what was remembered; nothing where no step is under way."""
        if self.armed:
            for before, now in zip(self.before, self.now):
                torch._foreach_copy_(now, before)
        self.armed = False
