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
NEAR = 0.05  # of the places: so close to 1 / k, and not above 2 / k, agreement is chance
ALONE = 1.5  # prototypes per image
QUICK = 0.97  # a lower momentum of the teacher is a likely cause
COARSE = 16  # cells of a map; with so few a cell sees most of the image


class Sizes(NamedTuple):
    """What the log does not say about its run."""

    num_prototypes: int  # k
    warmup_steps: int
    total_steps: int
    cells: int = 0  # h w of a view's map, 0: not known


class Sign(NamedTuple):
    """One way of failing."""

    name: str  # kept with the run, so that it is said once
    shown: Callable[[Sequence[Record], float, Sizes], bool]  # (lasting lines, most in use, sizes)
    line: Callable[[Record, Sizes], str]  # (last line, sizes)
    lasting: float = LASTING  # share of all steps


def lasting_lines(
    records: Sequence[Record], sizes: Sizes, lasting: float = LASTING
) -> Sequence[Record]:
    """The lines of so large a share of all steps up to now, at least LEAST_LINES; empty where that
    reaches back into the warm-up.
    """
    if len(records) < LEAST_LINES:
        return []
    began = records[-1]["step"] - min(lasting * sizes.total_steps, LONGEST)
    began = min(began, records[-LEAST_LINES]["step"])
    return [r for r in records if r["step"] >= began] if began > sizes.warmup_steps else []


def is_uniform(lines: Sequence[Record], most: float, sizes: Sizes) -> bool:
    """The group loss is what a uniform assignment has."""
    return all(r["group_loss"] >= UNIFORM * 2 * math.log(sizes.num_prototypes) for r in lines)


def is_few(lines: Sequence[Record], most: float, sizes: Sizes) -> bool:
    """Few prototypes are in use, of those that once were."""
    return most > A_FEW and all(r["prototypes_used"] <= max(FEW * most, A_FEW) for r in lines)


def is_alone(lines: Sequence[Record], most: float, sizes: Sizes) -> bool:
    """Each image has a prototype for itself."""
    return all(r["occupied_per_image"] < ALONE for r in lines)


def is_chance(lines: Sequence[Record], most: float, sizes: Sizes) -> bool:
    """Student and teacher agree as often as by chance."""
    chance = 1 / sizes.num_prototypes
    return all(r["agreement"] < chance + min(chance, NEAR) for r in lines)


def uniform_line(last: Record, sizes: Sizes) -> str:
    """Too soft a teacher."""
    chance = 2 * math.log(sizes.num_prototypes)
    return (
        f"the group loss is still {last['group_loss']:.3f}, where a uniform assignment has 2 ln k "
        f"= {chance:.3f}: the groups do not start; lower --temp-teacher"
    )


def few_line(last: Record, sizes: Sizes) -> str:
    """Too coarse a map, too quick a teacher, or too slow a center: what the run shows of these."""
    momentum = last["momentum_teacher"]
    if 0 < sizes.cells <= COARSE:
        advice = (
            f"a view has only {sizes.cells} cells, each of which sees most of the image; take an "
            "--arch of a smaller stride or a larger --image-size"
        )
    elif momentum < QUICK:
        advice = f"--momentum-teacher {momentum:g} is low, take 0.99"
    else:
        advice = "lower --momentum-center or take more --num-prototypes"
    return (
        f"only {last['prototypes_used']:.0f} of {sizes.num_prototypes} prototypes are in use: "
        f"{advice}"
    )


def alone_line(last: Record, sizes: Sizes) -> str:
    """A trunk that sees too much."""
    return (
        f"{last['occupied_per_image']:.1f} prototypes per image: whole images are grouped, since "
        "the trunk sees the whole image; take an --arch of a smaller stride and receptive field "
        "or a larger --image-size"
    )


def chance_line(last: Record, sizes: Sizes) -> str:
    """Views that differ too much."""
    return (
        f"student and teacher agree on {last['agreement']:.0%} of the places, where chance is "
        f"{1 / sizes.num_prototypes:.0%}: the trunk finds nothing that both views share; take "
        "milder colors, a larger --min-area or another --arch"
    )


# In this order: where all is uniform, agreement is chance; where few prototypes are in use, few are
# in an image. Of what follows from an earlier sign nothing is said.
SIGNS = (
    Sign("uniform", is_uniform, uniform_line),
    Sign("few", is_few, few_line, 2 * LASTING),  # healthy toy runs pass through 4 of 16, or of 32
    Sign("alone", is_alone, alone_line),
    Sign("chance", is_chance, chance_line),
)


def warnings(
    records: Sequence[Record], sizes: Sizes, said: Collection[str] = ()
) -> dict[str, str]:
    """What the log so far shows to be wrong: the name of the sign -> one line with the cause and
    the option to turn.

    records: the lines of log.jsonl in order; said: names of the signs that were said before in this
    run. At most one line, of the first of SIGNS that is shown.
    """
    most = max((r["prototypes_used"] for r in records), default=0)
    for sign in SIGNS:
        lines = lasting_lines(records, sizes, sign.lasting)
        if lines and sign.shown(lines, most, sizes):
            new = sign.name not in said
            return {sign.name: sign.line(lines[-1], sizes)} if new else {}
    return {}
