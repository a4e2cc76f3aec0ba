"""All ranks judge a step together: whether its numbers may reach the weights, and whether the run
must stop.

Slide: none.
Paper: none.
Differs: the released code looks at nothing; a bad step reaches the weights.

All ranks must agree on whether to skip a step: a rank that skipped one alone would have other
weights from then on, and a rank that stopped alone would leave the others waiting.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.ranks import rank_and_world_size, sum_over_ranks


class Verdict(NamedTuple):
    """The same on every rank, hence the same branch on every rank."""

    good: bool  # the step may change the weights: all numbers are finite, and no rank is in trouble
    values: list[float]  # means over ranks
    stop: bool  # some rank was asked to stop
    trouble: bool  # some rank cannot go on


def agree(values: Tensor, stop: bool, trouble: bool) -> Verdict:
    """One all-reduce of values (n), this rank's losses and norms, and of what this rank wants.

    This is the one place of the loop where the host waits for the device.
    """
    wanted = torch.tensor([stop, trouble], device=values.device)
    *sums, stop_sum, trouble_sum = sum_over_ranks(torch.cat([values, wanted])).tolist()
    means = [value / rank_and_world_size()[1] for value in sums]
    good = math.isfinite(sum(means)) and not trouble_sum
    return Verdict(good, means, bool(stop_sum), bool(trouble_sum))
