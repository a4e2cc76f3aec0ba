"""How far a run is: steps taken, batches consumed, and how it ended.

Slide: none.
Paper: none.
Differs: the released code counts epochs only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.verdict import Verdict


@dataclass
class Progress:
    """Counts that only `advance` changes. position = step + bad_steps: a step with bad numbers is
    none.
    """

    last_step: int
    max_bad_steps: int = 20
    step: int = 0  # optimizer steps taken
    position: int = 0  # batches consumed
    bad_steps: int = 0  # batches whose loss or gradient was not finite
    bad_in_row: int = 0
    ended: str = ""  # "" while the run goes on, then "done", "signal", "trouble" or "diverged"

    @property
    def finished(self) -> bool:
        """Whether no step follows."""
        return bool(self.ended) or self.step >= self.last_step

    def advance(self, verdict: Verdict) -> None:
        """Count the batch that this verdict was about. A batch that ended in trouble is met again
        by a rerun.
        """
        if verdict.good:
            self.step, self.bad_in_row = self.step + 1, 0
        elif not verdict.trouble:
            self.bad_steps, self.bad_in_row = self.bad_steps + 1, self.bad_in_row + 1
        self.position += not verdict.trouble
        if verdict.trouble:
            self.ended = "trouble"
        elif self.bad_in_row >= self.max_bad_steps:
            self.ended = "diverged"
        elif self.step >= self.last_step:
            self.ended = "done"
        elif verdict.stop:
            self.ended = "signal"

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return dict(
            step=self.step,
            position=self.position,
            bad_steps=self.bad_steps,
            bad_in_row=self.bad_in_row,
        )

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.step, self.position, self.bad_steps = (
            saved["step"],
            saved["position"],
            saved["bad_steps"],
        )
        # A run that is paused again and again would never find that it diverges. Older files do not
        # have it.
        self.bad_in_row = saved.get("bad_in_row", 0)


def seed_of(*parts: int) -> int:
    """One random stream per (seed, position in the run, rank): nothing of it must be saved."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
