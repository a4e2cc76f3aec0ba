"""The gradient of one batch, in parts and in mixed precision, and the optimizer's step.

Slide: none.
Paper: section 4.1 (mixed precision).
Differs: accumulation, and a look at the gradient before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine import processes


class Gradient:
    """loss and backward of a model that returns (loss, report), then one step of the optimizer.

    model: as all processes train it, wrapped or not; dtype: of autocast, None for float32;
    accumulate: parts per batch.
    """

    def __init__(
        self,
        model: Callable[..., tuple[Tensor, Any]],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype | None = None,
        accumulate: int = 1,
    ):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.dtype, self.accumulate = dtype, accumulate
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.moving = False  # while some weights have moved and others have not
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]

    def compute(self, *batch: Tensor) -> tuple[list[Any], Tensor]:
        """batch: tensors whose first axis is the image -> the reports of all parts, and the
        gradient's global norm.

        Afterwards the gradients hold the mean over parts and ranks.
        """
        reports = []
        share = len(batch[0]) // self.accumulate
        for start in range(0, len(batch[0]), share):
            part = [tensor[start : start + share] for tensor in batch]
            with processes.exchange(self.model, last=start + share == len(batch[0])):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss, report = self.model(*part)
                self.scaler.scale(loss / self.accumulate).backward()
            reports.append(report)
        self.scaler.unscale_(self.optimizer)
        return reports, nn.utils.get_total_norm(
            [p.grad for p in self.trained if p.grad is not None]
        )

    def step(self, lr: float) -> None:
        """Move the weights. What belongs to the step moves next; `clear` ends it."""
        self.moving = True
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def clear(self, scaled: bool = True) -> None:
        """Forget the gradient; scaled: the scale of fp16 follows what was seen."""
        if scaled:
            self.scaler.update()
        self.optimizer.zero_grad()
        self.moving = False
