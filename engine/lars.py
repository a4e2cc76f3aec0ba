"""LARS: momentum SGD in which every weight tensor moves by a fixed fraction of its own norm.

Slide: none.
Paper: the optimization paragraph of the experiments; You et al., 2017.
Differs: the arithmetic of the released code, on all tensors at once instead of one after another,
and in place.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling: first each gradient is given its weight's scale, then plain
    SGD takes the step.

    For tensors with ndim != 1: g <- g + weight_decay p, then g <- g coefficient |p| / |g| (factor 1
    if a norm is 0). Biases and norms (ndim 1) are neither decayed nor adapted. Then, for all:
    velocity <- momentum velocity + g; p <- p - lr velocity. Defaults [O], but for lr, which the
    schedule sets. A step overwrites the gradients. Raises ValueError for negative settings.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        coefficient: float = 0.001,
    ):
        settings = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, coefficient=coefficient
        )
        for name, value in settings.items():
            if value < 0:
                raise ValueError(f"LARS needs {name} >= 0, found {value}")
        # SGD's own decay stays 0: it would come after the norm is taken. Fused: velocity and
        # weights in one pass.
        super().__init__(params, lr, momentum, fused=True)
        self.weight_decay, self.coefficient = weight_decay, coefficient

    @torch.no_grad()
    def step(self) -> None:
        """Adapt the gradients of weights, then move everything by SGD with momentum."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.ndim != 1 and p.grad is not None]
            adapt(weights, self.weight_decay, self.coefficient)
        super().step()


def adapt(weights: list[Tensor], weight_decay: float, coefficient: float) -> None:
    """Turn the weights' gradients, in place, into updates of norm coefficient |weight|. The host
    waits for nothing.
    """
    if not weights:
        return
    gradients = [p.grad for p in weights]
    torch._foreach_add_(gradients, weights, alpha=weight_decay)  # first: its norm counts too [O]
    weight_norms = torch.stack(torch._foreach_norm(weights))
    gradient_norms = torch.stack(torch._foreach_norm(gradients))
    usable = (weight_norms > 0) & (gradient_norms > 0)
    ratios = torch.where(usable, coefficient * weight_norms / gradient_norms, 1.0)
    # Factors that stay on the device are one launch per weight: no multi-tensor product takes them,
    # and reading them would make the host wait.
    torch._foreach_mul_(gradients, list(ratios.unbind()))


def make_optimizer(
    name: str, parameters: Iterable[Tensor], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """ "lars" or "adamw", over the parameters that need a gradient; biases and norms are not
    decayed.
    """
    trained = [p for p in parameters if p.requires_grad]
    if name == "lars":
        return LARS(trained, lr, weight_decay=weight_decay)
    groups = [
        dict(params=[p for p in trained if p.ndim != 1]),
        dict(params=[p for p in trained if p.ndim == 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr, weight_decay=weight_decay)
