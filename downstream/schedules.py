"""The learning rate of a fine-tuning: pure functions of the step.

Slides: tables 2, 3 and 4. Paper: section 4.2. Differs: nothing known; the shapes are those of
detectron2 and of mmsegmentation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FineTuning:
    """What a fine-tuning intends, in optimizer steps.

    steps_per_epoch: steps between two writings of last.pth, for few images make short epochs;
    total_steps: length of the schedule; last_step: where the run ends, which may be earlier; peak:
    the rate; warmup_steps: the rate rises over these, linearly from peak / 1000; milestones: shares
    of the run after which it falls to a tenth, for "steps"; lowest: where "poly" ends.
    """

    steps_per_epoch: int
    total_steps: int
    last_step: int
    peak: float
    decay: str = "steps"
    warmup_steps: int = 0
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    power: float = 0.9
    lowest: float = 1e-4

    def learning_rate(self, step: int) -> float:
        """Of this step, 0 .. total_steps - 1.

        steps: peak 0.1^(number of milestones passed); poly: lowest + (peak - lowest) (1 - t /
        T)^power. Both times the warm-up's factor, 1/1000 + (1 - 1/1000) t / T_w for t < T_w.
        """
        rise = 1.0
        if step < self.warmup_steps:
            rise = 1e-3 + (1 - 1e-3) * step / self.warmup_steps
        if self.decay == "poly":
            return rise * (
                self.lowest
                + (self.peak - self.lowest) * (1 - step / self.total_steps) ** self.power
            )
        passed = sum(step >= round(share * self.total_steps) for share in self.milestones)
        return rise * self.peak * 0.1**passed
