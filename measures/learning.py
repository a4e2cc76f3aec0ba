"""Is it learning? The numbers of a step, the law of the first images, and three warnings.

The law [U]: near a uniform assignment both softmaxes of the group loss are linear. C is the
covariance of the features within a view, S the covariance between two views of the same places. A
prototype p moves along

    S p / temp_teacher - C p / temp_student,

so a direction p grows only where the correlation between the views is large enough:

    rho = p'Sp / p'Cp > temp_teacher / temp_student.

If no direction grows, the group loss goes back to 2 ln k, a uniform assignment, and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from engine.ranks import rank_and_world_size, sum_over_ranks
from grouping import assignment, full_precision, inverse_augmentation, overlapping
from slotcon import Report

# The law. All [U], from benchmarks/law.md
LAW_IMAGES = 256  # with fewer, the two estimates of rho lie further apart
DIRECTIONS = 64  # principal directions that are searched; more would fit the noise of few images
RIDGE = 1e-3  # of the mean variance of a direction
LEAST = 0.1  # below this, rho is noise
EDGE = 0.7, 1.1  # times the ratio: in between, runs started at 0.73 and at 0.99
MARGIN = 0.8  # of rho: a teacher temperature that leaves room for the images to come

# The warnings. All [U], between the failed and the healthy runs of tests/recorded
UNIFORM = 0.985  # of 2 ln k
FEW = 1 / 8  # of the most prototypes that were in use
A_FEW = 3  # prototypes are few whatever k is
ALONE = 1.5  # prototypes per image
LASTING = dict(uniform=0.1, few=0.2, alone=0.1)  # of all steps: a shorter time is a phase
SHORTEST, LONGEST = 40, 2000  # steps: limits of that time
WARNINGS = dict(
    uniform="the group loss is still {group_loss:.3f}, where a uniform assignment has 2 ln k: the "
    "groups do not start; lower --temp-teacher",
    few="only {prototypes_used:.0f} prototypes are in use: the teacher moves too fast, or a cell "
    "sees most of the image; raise --momentum-teacher, or use another --arch or --image-size",
    alone="{occupied_per_image:.1f} prototypes per image: a cell sees the whole image; use an "
    "--arch of a smaller stride, or raise --image-size",
)


@torch.no_grad()
def statistics(report: Report, center: Tensor, temp_teacher: float) -> dict[str, float]:
    """Numbers over the images of all ranks, for the log. Waits for the device.

    report: of this rank's forward; center (k); temp_teacher: of the teacher's assignment.
    """
    world_size = rank_and_world_size()[1]
    teacher_occupied = torch.stack([view.occupied for view in report.teacher])
    v, b, _ = teacher_occupied.shape
    maps = torch.cat([view.similarity for view in report.teacher])
    p = assignment(maps - center[:, None, None], temp_teacher)
    mean = sum_over_ranks(reduce(p, "b k h w -> k", "mean")) / world_size
    pairs = zip(report.student, reversed(report.teacher))  # (s1, t2), (s2, t1)
    same = [s.aligned.argmax(1) == t.aligned.argmax(1) for s, t in pairs]  # over k
    same = reduce(torch.stack(same).float(), "v b h w -> b", "mean")
    entropy = reduce(torch.special.entr(p), "b k h w -> b h w", "sum").mean()
    sums = [teacher_occupied.sum() / (v * b), entropy, (same * report.valid).sum()]
    sums = sum_over_ranks(torch.stack([*sums, report.valid.sum()]).float())
    used = sum_over_ranks(reduce(teacher_occupied.long(), "v b k -> k", "sum")) > 0
    return dict(
        occupied_per_image=sums[0].item() / world_size,
        prototypes_used=int(used.sum()),
        entropy_teacher=sums[1].item() / world_size,
        entropy_mean=torch.special.entr(mean).sum().item(),
        agreement=(sums[2] / sums[3].clamp(min=1)).item(),
    )


def brief(record: Mapping[str, Any]) -> str:
    """A line of the log for the screen."""
    form = (
        "loss {loss:.3f} (group {group_loss:.3f}, slot {slot_loss:.3f})  occupied "
        "{occupied_per_image:.1f}  in use {prototypes_used}  agreement {agreement:.2f}  "
        "{images_per_second:.0f} images/s"
    )
    return form.format(**record)


def moments(first: Tensor, second: Tensor) -> Tensor:
    """first, second (n c): features of the same n places in view 1 and in view 2 -> (2 c+1 c+1).

    The sum of x1 x1' + x2 x2' and the sum of x1 x2' + x2 x1', where every x begins with a 1, which
    counts and sums. Moments add over batches and ranks.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (F.pad(full_precision(x), (1, 0), value=1.0) for x in (first, second))
        between = first.T @ second
        return torch.stack([first.T @ first + second.T @ second, between + between.T])


def covariances(m: Tensor) -> Tensor:
    """Moments (2 c+1 c+1) -> C within a view and S between the views (2 c c)."""
    m = m / m[0, 0, 0]
    return m[:, 1:, 1:] - torch.outer(m[0, 0, 1:], m[0, 0, 1:])


def principal_axes(within: Tensor) -> Tensor:
    """C (c c) -> its DIRECTIONS strongest directions (c i), scaled to variance 1 but for RIDGE."""
    variance, axes = torch.linalg.eigh(within)  # ascending
    variance, axes = variance[-DIRECTIONS:].clamp(min=0), axes[:, -DIRECTIONS:]
    return axes * (variance + RIDGE * variance.mean() + 1e-30).rsqrt()


def best_correlation(pair: Tensor, test: Tensor) -> float:
    """The direction of the largest p'Sp / p'Cp, found in C and S (2 c c): its value in test."""
    axes = principal_axes(pair[0])
    p = axes @ torch.linalg.eigh(axes.T @ pair[1] @ axes)[1][:, -1]  # the largest
    within, between = p @ test @ p
    return (between / within.clamp(min=1e-30)).item()


def correlation_of(one: Tensor, other: Tensor) -> float:
    """rho in [-1, 1] from the moments of two halves of the images: the mean of two estimates.

    In the images in which it was found, the best of 64 directions is too good: some correlate by
    chance. In the other half, a direction found in few images is not yet the best one.
    """
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    pairs = [covariances(m) for m in (one + other, one, other)]
    axes = principal_axes(pairs[0][0])  # once, since a ResNet-50 has 2048 features
    together, one, other = (axes.T @ pair @ axes for pair in pairs)
    below = best_correlation(one, other) + best_correlation(other, one)
    return (best_correlation(together, together) + below / 2) / 2


def view_correlation(first: Tensor, second: Tensor) -> float:
    """The strongest correlation of any linear feature between two views of the same places.

    first, second (b n c): n places of b images, in view 1 and in view 2 -> rho in [-1, 1]. Raises
    ValueError for fewer than two images.
    """
    if len(first) < 2:
        raise ValueError(f"rho needs two images or more, found {len(first)}")
    rows = ((rearrange(x[i::2], "b n c -> (b n) c") for x in (first, second)) for i in (0, 1))
    return correlation_of(*(moments(*pair) for pair in rows))


class ViewCorrelation:
    """rho of the first images of a run, from the feature maps that its steps compute."""

    def __init__(self) -> None:
        self.seen = 0  # images of all ranks; every rank adds the same number
        self.halves: list[Tensor | float] = [0.0, 0.0]

    @torch.no_grad()
    def add(self, maps: Iterable[Tensor], boxes: Tensor, flipped: Tensor) -> None:
        """maps: features (b c h w) of view 1 and of view 2; boxes (b v 4), flipped (b v) as in
        `SlotCon.forward`. Images whose crops do not overlap count as seen and add nothing.
        """
        valid = overlapping(boxes)
        geometry = zip(maps, boxes.unbind(1), flipped.unbind(1))  # over v
        aligned = [inverse_augmentation(*of_view) for of_view in geometry]
        world_size = rank_and_world_size()[1]
        places = torch.arange(len(valid), device=valid.device) + self.seen // world_size
        for half in (0, 1):
            chosen = valid & (places % 2 == half)
            rows = (rearrange(x[chosen], "b c h w -> (b h w) c") for x in aligned)
            self.halves[half] = self.halves[half] + moments(*rows)
        self.seen += len(valid) * world_size

    def value(self) -> float:
        """rho over the images of all ranks; all ranks call it. NaN where no crops overlapped."""
        one, other = map(sum_over_ranks, self.halves)
        return correlation_of(one, other) if min(one[0, 0, 0], other[0, 0, 0]) > 2 else math.nan


def can_start(rho: float, temp_student: float, temp_teacher: float) -> bool:
    """Whether training leaves the uniform assignment while the features stay what they are."""
    return rho > temp_teacher / temp_student


def law_line(rho: float, temp_student: float, temp_teacher: float) -> str:
    """What the law predicts, in one line for the person who started the run."""
    if math.isnan(rho):
        return "the crops of the first images do not overlap: raise --min-area"
    ratio = temp_teacher / temp_student
    measured, threshold = f"views correlate {rho:.2f}", f"temp_teacher / temp_student = {ratio:.2f}"
    if rho > EDGE[1] * ratio:
        return f"{measured}, above {threshold}: the groups can start"
    advice = "use milder colors, larger crops or another --arch"
    if rho >= LEAST:
        advice = f"--temp-teacher {MARGIN * rho * temp_student:.2g} could start"
    if rho > EDGE[0] * ratio:
        return f"{measured}, near {threshold}: the groups may start late or never; {advice}"
    return f"{measured}, below {threshold}: the groups cannot start on these images; {advice}"


def signs_of(record: Mapping[str, float], k: int, most: float) -> dict[str, bool]:
    """Which signs of failing a line of the log shows; most: prototypes in use at most so far."""
    return dict(
        uniform=record["group_loss"] >= UNIFORM * 2 * math.log(k),
        few=most > A_FEW and record["prototypes_used"] <= max(FEW * most, A_FEW),
        alone=record["occupied_per_image"] < ALONE,
    )


class Watch:
    """Lines to print about a run: the law once, each warning once. No bit of a run depends on it.

    c: settings with num_prototypes, temp_student and temp_teacher; warmup_steps, total_steps: of
    the run; notes: kept with its checkpoint, so that a resumed run repeats nothing.
    """

    def __init__(self, c: Any, warmup_steps: int, total_steps: int, notes: dict[str, Any]):
        self.c, self.warmup_steps, self.total_steps = c, warmup_steps, total_steps
        self.correlation = None if "watch" in notes else ViewCorrelation()
        self.notes = notes.setdefault("watch", dict(most=0, without={}, warned=[]))

    def step(self, report: Report, boxes: Tensor, flipped: Tensor) -> list[str]:
        """What the law predicts, once it has seen enough images. All ranks call it after each step.

        boxes (b v 4), flipped (b v): of the whole batch, whose last part the report describes.
        """
        if self.correlation is None:
            return []
        b, maps = len(report.valid), [view.features for view in report.teacher]
        self.correlation.add(maps, boxes[-b:], flipped[-b:])
        if self.correlation.seen < LAW_IMAGES:
            return []
        rho, self.correlation = self.correlation.value(), None
        return [f"law      {law_line(rho, self.c.temp_student, self.c.temp_teacher)}"]

    def line(self, record: Mapping[str, float]) -> list[str]:
        """The first sign that has lasted, if it is new. Call it with each line of the log."""
        without, warned, step = self.notes["without"], self.notes["warned"], record["step"]
        self.notes["most"] = most = max(self.notes["most"], record["prototypes_used"])
        for name, shown in signs_of(record, self.c.num_prototypes, most).items():
            earlier = without.get(name, step)
            without[name] = earlier if shown and step > self.warmup_steps else step
        for name, last in without.items():
            if step - last > max(SHORTEST, min(LASTING[name] * self.total_steps, LONGEST)):
                if name in warned:
                    return []
                warned.append(name)
                return [f"warning  {WARNINGS[name].format(**record)}"]
        return []
