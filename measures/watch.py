"""What a run is told about itself while it goes on: the law on its first images, and the signs of
failing that its log shows.

Slide: none. Paper: none. Differs: ours [U]. The law stands in measures/law.py, the signs in
measures/health.py.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from measures.health import Record, Sizes, warnings
from measures.law import ViewCorrelation, verdict_of
from slotcon import Report


class Watch:
    """Lines for the screen. It only reads what the steps computed, so no bit of a run depends on
    it.

    sizes: of the run; temp_student, temp_teacher: at the first step; notes: of the run, kept with
    its checkpoint, where it is noted what was said; fresh: the run starts here, so the law is
    measured; records: the lines of the log so far.
    """

    def __init__(
        self, sizes: Sizes, temp_student: float, temp_teacher: float,
        notes: MutableMapping[str, Any], fresh: bool, records: Sequence[Record] = (),
    ):  # fmt: skip
        self.sizes, self.notes = sizes, notes
        self.temperatures = temp_student, temp_teacher
        self.correlation = ViewCorrelation() if fresh else None
        self.records: list[Record] = list(records)

    def first_steps(self, report: Report, boxes: Tensor, flipped: Tensor) -> list[str]:
        """What the law says, once it has seen enough images. All ranks call it after each step.

        boxes (b v 4), flipped (b v): of the batch whose last part is reported.
        """
        if self.correlation is None:
            return []
        self.correlation.add_step(report, boxes, flipped)
        if not self.correlation.done:
            return []
        rho, self.correlation = self.correlation.value(), None
        return [f"law      {verdict_of(rho, *self.temperatures)}"]

    def line_of_log(self, record: Record) -> list[str]:
        """What the log shows to be wrong, each sign once in a run. Called with every line of it."""
        self.records.append(record)
        said = self.notes.get("warned", [])
        found = warnings(self.records, self.sizes, said)
        if found:
            self.notes["warned"] = [*said, *found]
        return [f"warning  {line}" for line in found.values()]
