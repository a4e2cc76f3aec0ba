"""What adds up between two lines of the log, across restarts too.

Slide: none.
Paper: none.
Differs: not in the released code.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any


class Meter:
    """A log line averages exactly the steps since the last one.

    names: of the values that every step adds, in the order of the verdict; size: images per step.
    """

    def __init__(self, names: Sequence[str], size: int, step: int = 0):
        self.names, self.size = tuple(names), size
        # Step of the last line, and what was added since
        self.logged, self.sums = (step, [0.0] * len(self.names))
        # Since when this process has measured its speed
        self.timed, self.since = (step, time.perf_counter())

    def add(self, values: Sequence[float]) -> None:
        """The values of one step that counted."""
        self.sums = [a + b for a, b in zip(self.sums, values)]

    def read(self, step: int) -> dict[str, float]:
        """Means since the last line, and images per second; starts the next line."""
        steps, seconds = step - self.logged, time.perf_counter() - self.since
        line = {name: total / steps for name, total in zip(self.names, self.sums)}
        line["images_per_second"] = (step - self.timed) * self.size / seconds
        line["steps_timed"] = step - self.timed
        self.logged, self.sums = step, [0.0] * len(self.names)
        self.timed, self.since = step, time.perf_counter()
        return line

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(logged=self.logged, sums=self.sums)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept; the clock starts anew."""
        self.logged, self.sums = saved["logged"], saved["sums"]
        self.timed = saved["step"]
