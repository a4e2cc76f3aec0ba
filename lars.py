"""LARS: momentum SGD in which every weight tensor moves by a fixed fraction of its own norm.

Paper: the optimisation paragraph of the experiments; You et al., 2017.
Differs: the arithmetic of the released code, on all tensors at once instead of one after another.
Read next: train.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    For tensors with ndim != 1: g <- g + weight_decay p, then g <- g coefficient |p| / |g| (factor 1 if a norm is 0).
    Biases and norms (ndim 1) are neither decayed nor adapted. Then, for all: velocity <- momentum velocity + g;
    p <- p - lr velocity. Defaults [O], but for lr, which the schedule sets.
    Raises ValueError for negative settings.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.9, weight_decay: float = 1e-5,
                 coefficient: float = 0.001):
        settings = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, coefficient=coefficient)
        for name, value in settings.items():
            if value < 0:
                raise ValueError(f"LARS needs {name} >= 0, found {value}")
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            update = adapted([p for p in params if p.ndim != 1], group["weight_decay"], group["coefficient"])
            plain = [p for p in params if p.ndim == 1]
            params = [p for p in params if p.ndim != 1] + plain
            update += [p.grad for p in plain]
            for p in params:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, update)
            torch._foreach_add_(params, velocity, alpha=-group["lr"])


def adapted(weights: list[Tensor], weight_decay: float, coefficient: float) -> list[Tensor]:
    """The decayed gradients, each scaled to coefficient x the norm of its weight; new tensors. No host wait."""
    if not weights:
        return []
    # The decay comes first: it is part of the gradient whose norm is taken [O].
    update = list(torch._foreach_add([p.grad for p in weights], weights, alpha=weight_decay))
    weight_norms = torch.stack(torch._foreach_norm(weights))
    update_norms = torch.stack(torch._foreach_norm(update))
    usable = (weight_norms > 0) & (update_norms > 0)
    ratios = torch.where(usable, coefficient * weight_norms / update_norms, 1.0)
    torch._foreach_mul_(update, list(ratios.unbind()))
    return update
