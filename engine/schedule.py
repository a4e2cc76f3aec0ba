"""The learning rate of every step, and the last step: pure functions of the step.

Slide: none.
Paper: section 4.1.
Differs: nothing known; the release raises the rate at every step too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from peak / 100 over the warm-up, then a cosine down to 1e-6, at every optimizer step
    [O].

    lr(t) = peak / 100 (99 t / T_w + 1) for t < T_w, then 1e-6 + (peak - 1e-6) (1 + cos(pi (t - T_w)
    / (T - T_w))) / 2.
    """
    if step < warmup_steps:
        return peak / 100 * (99 * step / warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * progress)) / 2


def warm_up(step: float, steps: float, start: float, end: float) -> float:
    """A straight line from start to end over so many steps, then end; end at once where there are
    none. Both may be shares of the run instead.

    DINO raises the teacher's temperature like this; SlotCon does not, and no preset does.
    """
    return end if step >= steps else start + (end - start) * step / steps


@dataclass(frozen=True)
class Schedule:
    """What a run intends. total_steps: length of all schedules; last_step: where the run ends,
    which may be earlier.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    last_step: int
    peak: float

    def ends_epoch(self, position: int) -> bool:
        """Whether so many batches are whole epochs."""
        return position % self.steps_per_epoch == 0

    @property
    def epochs(self) -> int:
        """Whole epochs until the last step."""
        return self.last_step // self.steps_per_epoch

    def is_logged(self, step: int, position: int, log_every: int) -> bool:
        """Whether the log gets a line: every so many steps, after the first, at the last, and at
        the end of an epoch that is longer than that.
        """
        epoch = self.ends_epoch(position) and self.steps_per_epoch > log_every
        return step % log_every == 0 or step in (1, self.last_step) or epoch

    def learning_rate(self, step: int) -> float:
        """Of the step that follows so many."""
        return learning_rate(step, self.total_steps, self.warmup_steps, self.peak)
