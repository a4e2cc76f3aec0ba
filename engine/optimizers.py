"""LARS, and the learning rate of every step: pure functions of the step."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al., 2017), with the arithmetic of the release [O].

    A weight tensor (ndim != 1) moves by a fixed fraction of its own norm:
        g <- g + weight_decay p, then g <- g coefficient |p| / |g|, factor 1 if a norm is 0.
    Biases and norms (ndim 1) are neither decayed nor adapted. Then, for all parameters:
        velocity <- momentum velocity + g, p <- p - lr velocity.
    A step overwrites the gradients.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.9,
        weight_decay: float = 1e-5, coefficient: float = 0.001,
    ):  # fmt: skip
        # SGD's own decay stays 0: it would come after the norm is taken
        super().__init__(params, lr, momentum, fused=True)
        self.weight_decay, self.coefficient = weight_decay, coefficient

    @torch.no_grad()
    def step(self) -> None:
        """Adapt the gradients of weights, then move everything by SGD with momentum."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.ndim != 1 and p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            # First, since its norm counts too [O]
            torch._foreach_add_(gradients, weights, alpha=self.weight_decay)
            weight_norms = torch.stack(torch._foreach_norm(weights))
            gradient_norms = torch.stack(torch._foreach_norm(gradients))
            usable = (weight_norms > 0) & (gradient_norms > 0)
            ratios = torch.where(usable, self.coefficient * weight_norms / gradient_norms, 1.0)
            # One launch per weight, since to read the factors would make the host wait
            torch._foreach_mul_(gradients, list(ratios.unbind()))
        super().step()


def make_optimizer(
    name: str, parameters: Iterable[Tensor], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """lars or adamw, over the parameters that need a gradient; biases and norms are not decayed."""
    trained = [p for p in parameters if p.requires_grad]
    if name == "lars":
        return LARS(trained, lr, weight_decay=weight_decay)
    weights, others = ([p for p in trained if (p.ndim == 1) == flat] for flat in (False, True))
    groups = [dict(params=weights), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr, weight_decay=weight_decay)


class Schedule(NamedTuple):
    """What a run intends, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int  # length of all schedules
    warmup_steps: int
    peak: float  # learning rate after the warm-up

    def learning_rate(self, step: int) -> float:
        """Of step t: a linear warm-up, then a cosine down to 1e-6, changed at every step [O].

        lr(t) = peak / 100 (99 t / T_w + 1), for t < T_w
        lr(t) = 1e-6 + (peak - 1e-6) (1 + cos(pi (t - T_w) / (T - T_w))) / 2, from T_w on.
        """
        peak, warmup = self.peak, self.warmup_steps
        if step < warmup:
            return peak / 100 * (99 * step / warmup + 1)
        progress = (step - warmup) / max(self.total_steps - warmup, 1)
        return 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * progress)) / 2


def schedule_for(
    num_images: int, batch_size: int, base_lr: float, epochs: float, steps: int, warmup: float
) -> Schedule:
    """A length in steps, or in epochs where steps is 0; the warm-up has the same unit [O].

    peak = base_lr batch_size / 256
    """
    steps_per_epoch = num_images // batch_size
    unit = 1 if steps else steps_per_epoch
    total = max(round((steps or epochs) * unit), 1)
    return Schedule(steps_per_epoch, total, round(warmup * unit), base_lr * batch_size / 256)
