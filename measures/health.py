"""Is something wrong with a run? One line for each way of failing that its log shows.

Slides: "Towards semantic prototypes: deep clustering" (avoiding collapse), "Statistics about the
slots". Paper: section 4.4. Differs: ours [U]. The thresholds lie between the recorded failures and
the recorded healthy runs of tests/recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

Record = Mapping[str, float]  # a line of log.jsonl

# All [U].
LASTING = 0.1  # of all steps: what lasts as long is not a phase
LONGEST = 2000  # steps of that; in a long run nobody waits for a tenth of it
LEAST_LINES = 5  # of the log, in that time
UNIFORM = 0.985  # of 2 ln k
FEW = 1 / 8  # of the most prototypes that were in use
A_FEW = 3  # are few whatever k is
CHANCE = 2.0  # times 1 / k
ALONE = 1.5  # prototypes per image
CHANGE = 0.97  # a lower momentum of the teacher is a likely cause


class Sign(NamedTuple):
    """One way of failing."""

    name: str  # kept with the run, so that it is said once
    shown: Callable[[Sequence[Record], float, int], bool]  # (lasting lines, most in use, k)
    line: Callable[[Record, int], str]  # (last line, k)
    lasting: float = LASTING  # share of all steps


def lasting_lines(
    records: Sequence[Record], warmup_steps: int, total_steps: int, lasting: float = LASTING
) -> Sequence[Record]:
    """The lines of so large a share of all steps up to now, at least LEAST_LINES; empty where that
    reaches back into the warm-up.
    """
    if len(records) < LEAST_LINES:
        return []
    began = records[-1]["step"] - min(lasting * total_steps, LONGEST)
    began = min(began, records[-LEAST_LINES]["step"])
    return [r for r in records if r["step"] >= began] if began > warmup_steps else []


def uniform(lines: Sequence[Record], most: float, k: int) -> bool:
    return all(r["group_loss"] >= UNIFORM * 2 * math.log(k) for r in lines)


def few(lines: Sequence[Record], most: float, k: int) -> bool:
    return all(r["prototypes_used"] <= max(FEW * most, A_FEW) for r in lines) and most > A_FEW


def alone(lines: Sequence[Record], most: float, k: int) -> bool:
    return all(r["occupied_per_image"] < ALONE for r in lines)


def by_chance(lines: Sequence[Record], most: float, k: int) -> bool:
    return all(r["agreement"] < CHANCE / k for r in lines)


def uniform_line(last: Record, k: int) -> str:
    return (
        f"the group loss is still {last['group_loss']:.3f}, and 2 ln k = {2 * math.log(k):.3f} is "
        "what a uniform assignment has: the groups do not start; lower --temp-teacher"
    )


def few_line(last: Record, k: int) -> str:
    momentum = last["momentum_teacher"]
    first = (
        f"raise --momentum-teacher, now {momentum:g}, to 0.99"
        if momentum < CHANGE
        else "lower --momentum-center"
    )
    return (
        f"only {last['prototypes_used']:.0f} of {k} prototypes are in use, the others have died: "
        f"{first}, or raise --num-prototypes"
    )


def alone_line(last: Record, k: int) -> str:
    return (
        f"{last['occupied_per_image']:.1f} prototypes per image: images are grouped, not their "
        "parts; the trunk sees the whole image: take another --arch or a larger --image-size"
    )


def chance_line(last: Record, k: int) -> str:
    return (
        f"student and teacher agree on {last['agreement']:.0%} of the places, chance is "
        f"{1 / k:.0%}: the two views have nothing in common that the trunk sees; take milder "
        "colors, a larger --min-area or another --arch"
    )


# In this order: who is uniform agrees by chance, and who has few prototypes has few per image. Of
# what follows from another sign nothing is said.
SIGNS = (
    Sign("uniform", uniform, uniform_line),
    Sign("few", few, few_line, 2 * LASTING),  # healthy toy runs pass through 4 of 16, or of 32
    Sign("alone", alone, alone_line),
    Sign("chance", by_chance, chance_line),
)


def warnings(
    records: Sequence[Record],
    num_prototypes: int,
    warmup_steps: int,
    total_steps: int,
    said: Collection[str] = (),
) -> dict[str, str]:
    """What the log so far shows to be wrong: the name of the sign -> one line with the cause and
    the option to turn.

    records: the lines of log.jsonl in order; num_prototypes: k; said: names of signs that were
    said before in this run. At most one, the first of SIGNS that is shown.
    """
    most = max((r["prototypes_used"] for r in records), default=0)
    for sign in SIGNS:
        lines = lasting_lines(records, warmup_steps, total_steps, sign.lasting)
        if lines and sign.shown(lines, most, num_prototypes):
            if sign.name in said:
                return {}
            return {sign.name: sign.line(lines[-1], num_prototypes)}
    return {}
