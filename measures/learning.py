"""The numbers of a step, three warnings, and the law of the first images [U]: from a uniform
assignment, a prototype p can start only where the views correlate enough,

    rho = p'Sp / p'Cp > temp_teacher / temp_student,

C: covariance of the features within a view; S: between two views of the same places.
"""

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
EDGE = 0.7, 1.1  # times the ratio: in between some runs start at once, some late, some never
MARGIN = 0.8  # of rho: a teacher temperature that leaves room for the images to come

# The warnings. All [U], between the failed and the healthy runs of tests/recorded
UNIFORM = 0.985  # of 2 ln k
FEW, A_FEW = 1 / 8, 3  # of the most prototypes that were in use; few whatever k is
ALONE = 1.5  # prototypes per image
LASTING = dict(uniform=0.1, few=0.2, alone=0.1)  # of all steps: a shorter time is a phase
SHORTEST, LONGEST = 40, 2000  # steps: limits of that time
WARNINGS = dict(
    uniform="the group loss is still {group_loss:.3f}, where a uniform assignment has 2 ln k: the "
    "groups have not started; lower --temp-teacher",
    few="only {prototypes_used:.0f} prototypes are in use: the teacher moves too fast, or a cell "
    "sees most of the image; raise --momentum-teacher, or use another --arch or --image-size",
    alone="{occupied_per_image:.1f} prototypes per image: a cell sees the whole image; use an "
    "--arch of a smaller stride, or raise --image-size",
)


@torch.no_grad()
def statistics(report: Report, center: Tensor, temp_teacher: float) -> dict[str, float]:
    """Numbers over the images of all ranks, for the log; center (k). Waits for the device."""
    world_size = rank_and_world_size()[1]
    teacher_occupied = torch.stack([view.occupied for view in report.teacher]).float()  # (v b k)
    maps = torch.cat([view.similarity for view in report.teacher])
    p = assignment(maps - center[:, None, None], temp_teacher)
    pairs = zip(report.student, reversed(report.teacher))  # (s1, t2), (s2, t1)
    same = [s.aligned.argmax(1) == t.aligned.argmax(1) for s, t in pairs]  # over k
    same = reduce(torch.stack(same).float(), "v b h w -> b", "mean")
    entropy = reduce(torch.special.entr(p), "b k h w -> b h w", "sum").mean()
    active = reduce(teacher_occupied, "v b k -> k", "sum")
    means = [entropy, active.sum() / teacher_occupied[..., 0].numel(), (same * report.valid).sum()]
    means = sum_over_ranks(torch.stack([*means, report.valid.sum()]).float()) / world_size
    mean = sum_over_ranks(reduce(p, "b k h w -> k", "mean")) / world_size
    return dict(
        occupied_per_image=means[1].item(),
        prototypes_used=int((sum_over_ranks(active) > 0).sum()),
        entropy_teacher=means[0].item(),
        entropy_mean=torch.special.entr(mean).sum().item(),
        agreement=(means[2] / means[3].clamp(min=1 / world_size)).item(),
    )


def brief(record: Mapping[str, Any]) -> str:
    """A line of the log for the screen."""
    return (
        "loss {loss:.3f} (group {group_loss:.3f}, slot {slot_loss:.3f})  "
        "occupied {occupied_per_image:.1f}  in use {prototypes_used}  agreement {agreement:.2f}  "
        "{images_per_second:.0f} images/s  {memory_gb:.1f} GB"
    ).format(**record)


def moments(first: Tensor, second: Tensor) -> Tensor:
    """Two views (n c) -> x1 x1' + x2 x2', x1 x2' + x2 x1' (2 c+1 c+1); each x begins with a 1."""
    with torch.autocast(first.device.type, enabled=False):
        first, second = (F.pad(full_precision(x), (1, 0), value=1.0) for x in (first, second))
        between = first.T @ second
        return torch.stack([first.T @ first + second.T @ second, between + between.T])


def principal_axes(within: Tensor) -> Tensor:
    """C (c c) -> its strongest directions (c i), scaled to variance 1 but for RIDGE."""
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
    """rho in [-1, 1] from the moments of two halves of the images: the mean of two estimates."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    means = [m / m[0, 0, 0] for m in (one + other, one, other)]
    pairs = [m[:, 1:, 1:] - torch.outer(m[0, 0, 1:], m[0, 0, 1:]) for m in means]  # C and S
    axes = principal_axes(pairs[0][0])  # once, since a ResNet-50 has 2048 features
    together, one, other = (axes.T @ pair @ axes for pair in pairs)
    below = best_correlation(one, other) + best_correlation(other, one)
    # Where the best direction was found it is too good, and in the other half too bad.
    return (best_correlation(together, together) + below / 2) / 2


def view_correlation(first: Tensor, second: Tensor) -> float:
    """rho in [-1, 1] of two views (b n c) of the same n places of two images or more."""
    rows = ((rearrange(x[i::2], "b n c -> (b n) c") for x in (first, second)) for i in (0, 1))
    return correlation_of(*(moments(*pair) for pair in rows))


class ViewCorrelation:
    """rho of the first images of a run, from the feature maps that its steps compute."""

    def __init__(self) -> None:
        self.seen = 0  # images of all ranks; every rank adds the same number
        self.halves: list[Tensor | float] = [0.0, 0.0]

    @torch.no_grad()
    def add(self, maps: Iterable[Tensor], boxes: Tensor, flipped: Tensor) -> None:
        """maps: features (b c h w) of both views; boxes (b v 4), flipped (b v) as in `SlotCon`."""
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
        """rho over the images of all ranks, which all call it. NaN where no crops overlapped."""
        one, other = map(sum_over_ranks, self.halves)
        return correlation_of(one, other) if min(one[0, 0, 0], other[0, 0, 0]) > 2 else math.nan


def law_line(rho: float, temp_student: float, temp_teacher: float) -> str:
    """What the law predicts, in one line."""
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
    return f"{measured}, below {threshold}: the groups will hardly start on these images; {advice}"


class Watch:
    """Lines about a run, each once. notes: kept with the checkpoint, so that none is repeated."""

    def __init__(self, c: Any, warmup_steps: int, total_steps: int, notes: dict[str, Any]):
        self.c, self.warmup_steps, self.total_steps = c, warmup_steps, total_steps
        self.notes = notes.setdefault("watch", dict(most=0, without={}, warned=[], law=False))
        self.correlation = None if self.notes.get("law") else ViewCorrelation()

    def step(self, report: Report, boxes: Tensor, flipped: Tensor) -> list[str]:
        """What the law predicts, after enough images. boxes (b v 4), flipped (b v). All ranks."""
        if self.correlation is None:
            return []
        # The report describes the last part of the batch.
        b, maps = len(report.valid), [view.features for view in report.teacher]
        self.correlation.add(maps, boxes[-b:], flipped[-b:])
        if self.correlation.seen < LAW_IMAGES:
            return []
        rho, self.correlation, self.notes["law"] = self.correlation.value(), None, True
        return [f"law      {law_line(rho, self.c.temp_student, self.c.temp_teacher)}"]

    def line(self, record: Mapping[str, float]) -> list[str]:
        """The first sign that has lasted, if it is new. Call it with each line of the log."""
        without, warned, step = self.notes["without"], self.notes["warned"], record["step"]
        self.notes["most"] = most = max(self.notes["most"], record["prototypes_used"])
        signs = dict(
            uniform=record["group_loss"] >= UNIFORM * 2 * math.log(self.c.num_prototypes),
            few=most > A_FEW and record["prototypes_used"] <= max(FEW * most, A_FEW),
            alone=record["occupied_per_image"] < ALONE,
        )
        for name, shown in signs.items():
            earlier = without.get(name, step)
            without[name] = earlier if shown and step > self.warmup_steps else step
        for name, last in without.items():
            if step - last > max(SHORTEST, min(LASTING[name] * self.total_steps, LONGEST)):
                if name in warned:
                    return []
                warned.append(name)
                return [f"warning  {WARNINGS[name].format(**record)}"]
        return []
