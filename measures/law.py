"""The law: can these temperatures start on these images? Measured on the first steps of a run.

Slide: "Towards semantic prototypes: deep clustering" (avoiding collapse: centering, sharpening).
Paper: section 3.3. Differs: not in the paper or the released code [U].

Near a uniform assignment both softmaxes of the group loss are linear. A prototype p then moves by
(S / temp_teacher - C / temp_student) p, where C is the covariance of the features of one view and S
that of the two views at the same places of the scene. So a direction grows only if its correlation
between the views, rho = p'Sp / p'Cp, exceeds temp_teacher / temp_student; if no direction does, the
group loss falls back to 2 ln k, a uniform assignment, and stays there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from engine.ranks import rank_and_world_size, sum_over_ranks
from grouping import GroupingNetwork, full_precision, inverse_augmentation
from slotcon import Report

# All [U].
IMAGES = 256  # of fewer, the two estimates that make rho lie further apart
DIRECTIONS = 64  # principal directions that are searched; more would fit the noise of few images
RIDGE = 1e-3  # of the mean variance of a direction
LEAST = 0.1  # below this, rho is noise, and a temperature that small copies every accident
EDGE = 0.7, 1.1  # times the ratio: between these the sign is not certain: 0.73 and 0.99 started
RIPENING = 0.8  # of the ratio suffices for a run, whose trunk learns meanwhile: benchmarks/law.md
MARGIN = 0.8  # of rho: a teacher temperature that leaves room for the images to come


class Moments(NamedTuple):
    """Sums over pixels of both views; they add over batches and ranks."""

    count: Tensor  # () pixels per view
    total: Tensor  # (c) sum of the features of both views
    same: Tensor  # (c c) sum of x1 x1' + x2 x2', within a view
    cross: Tensor  # (c c) sum of x1 x2' + x2 x1', between the views at the same place


def moments(first: Tensor, second: Tensor) -> Moments:
    """first, second (n c): features at the same n places of the scene, in view 1 and in view 2.

    Raises ValueError where the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"expected two sets of rows (n c), found {tuple(first.shape)} and {tuple(second.shape)}"
        )
    with torch.autocast(first.device.type, enabled=False):
        first, second = full_precision(first), full_precision(second)
        between = first.T @ second
        return Moments(
            torch.tensor(float(len(first)), device=first.device),
            reduce(first + second, "n c -> c", "sum"),
            first.T @ first + second.T @ second,
            between + between.T,
        )


def added(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together."""
    return Moments(*(torch.stack(sums).sum(dim=0) for sums in zip(*parts)))  # over the parts


def covariances(m: Moments) -> tuple[Tensor, Tensor]:
    """C within a view and S between the views, both (c c)."""
    count, total, same, cross = m
    mean = total / (2 * count)
    mean_square = torch.outer(mean, mean)
    return same / (2 * count) - mean_square, cross / (2 * count) - mean_square


def projected(m: Moments, axes: Tensor) -> Moments:
    """The moments of the features along axes (c i)."""
    axes = axes.to(m.same)
    return Moments(m.count, axes.T @ m.total, axes.T @ m.same @ axes, axes.T @ m.cross @ axes)


def principal_axes(m: Moments) -> Tensor:
    """The DIRECTIONS strongest directions of C (c i), scaled to variance 1, but for the ridge."""
    variance, axes = torch.linalg.eigh(covariances(m)[0])  # ascending
    variance, axes = variance[-DIRECTIONS:].clamp(min=0), axes[:, -DIRECTIONS:]
    return axes * (variance + RIDGE * variance.mean() + 1e-30).rsqrt()


def strongest_direction(m: Moments) -> Tensor:
    """The direction p (c) of the largest p'Sp / p'Cp."""
    axes = principal_axes(m)
    return axes @ torch.linalg.eigh(covariances(projected(m, axes))[1])[1][:, -1]  # the largest


def double(m: Moments) -> Moments:
    """In float64 on the CPU, where eigenvectors are found."""
    return Moments(*(x.detach().cpu().double() for x in m))


def correlation_along(direction: Tensor, m: Moments) -> float:
    """p'Sp / p'Cp of a direction p (c): the correlation of that feature between the views."""
    within, between = (direction @ matrix @ direction for matrix in covariances(m))
    return (between / within.clamp(min=1e-30)).item()


def correlation_of(halves: tuple[Moments, Moments]) -> float:
    """rho in [-1, 1], the middle of two estimates from two halves of the images.

    Judged on the images in which it was found, the best of 64 directions flatters: some correlate
    by chance. Judged on the other half, a direction found in few images is not yet the best one.
    With three times the images both come to lie near the middle.
    """
    together = added(map(double, halves))
    axes = principal_axes(together)  # once, since a ResNet-50 has 2048 features
    one, other = (projected(double(half), axes) for half in halves)
    together = projected(together, axes)
    above = correlation_along(strongest_direction(together), together)
    below = correlation_along(strongest_direction(one), other)
    below += correlation_along(strongest_direction(other), one)
    return (above + below / 2) / 2


def view_correlation(first: Tensor, second: Tensor) -> float:
    """The strongest correlation of any linear feature between two views of the same places.

    first, second (b n c): n places of b images, seen in view 1 and in view 2 -> rho in [-1, 1]. It
    does not change under invertible linear maps of the features, but for the ridge. Raises
    ValueError for fewer than two images.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"one half of the images judges the other: found {len(first)} image(s)")
    return correlation_of(
        tuple(
            moments(*(rearrange(x[half::2], "b n c -> (b n) c") for x in (first, second)))
            for half in (0, 1)
        )
    )


class ViewCorrelation:
    """rho of the first images of a run, from what its ordinary steps compute anyway.

    enough: images of all ranks after which it is known. Every rank gives it the same number of
    images, so all ranks are done at the same step.
    """

    def __init__(self, enough: int = IMAGES):
        self.enough, self.seen = enough, 0  # images of all ranks
        self.halves: list[list[Moments]] = [[], []]

    @property
    def done(self) -> bool:
        """Whether enough images were seen."""
        return self.seen >= self.enough

    @torch.no_grad()
    def add(self, first: Tensor, second: Tensor, boxes: Tensor, flipped: Tensor) -> None:
        """Feature maps (b c h w) of view 1 and of view 2; boxes (b v 4), flipped (b v) as in
        `SlotCon.forward`. Images whose crops do not overlap count as seen and add nothing.
        """
        valid = (boxes[:, 0, 2] > boxes[:, 0, 0]) & (boxes[:, 0, 3] > boxes[:, 0, 1])
        aligned = [
            inverse_augmentation(maps, boxes[:, i], flipped[:, i])
            for i, maps in enumerate((first, second))
        ]
        world_size = rank_and_world_size()[1]
        places = torch.arange(len(first), device=first.device) + self.seen // world_size
        for half, sums in enumerate(self.halves):
            own = valid & (places % 2 == half)
            rows = [rearrange(x[own], "b c h w -> (b h w) c") for x in aligned]
            sums[:] = [added([*sums, moments(*rows)])]
        self.seen += len(first) * world_size

    def add_step(self, report: Report, boxes: Tensor, flipped: Tensor) -> None:
        """What a step reports of the teacher. boxes, flipped: of the whole batch, whose last part
        the report describes.
        """
        t1, t2 = report.teacher
        b = len(report.valid)
        self.add(t1.features, t2.features, boxes[-b:], flipped[-b:])

    def value(self) -> float:
        """rho over the images of all ranks; all ranks call it. NaN where no crops overlapped."""
        one, other = (Moments(*map(sum_over_ranks, sums[0])) for sums in self.halves)
        return correlation_of((one, other)) if min(one.count, other.count) > 1 else math.nan


@torch.no_grad()
def measure(network: GroupingNetwork, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """rho of a network on a few batches (views, boxes, flipped), as in `SlotCon.forward`.

    It works on a copy in training mode, which normalizes with batch statistics like the first step
    of a run: neither weights nor statistics of `network` change.
    """
    backbone, found = copy.deepcopy(network.backbone).train(), ViewCorrelation()
    for views, boxes, flipped in batches:
        found.add(*(backbone(images) for images in views.unbind(1)), boxes, flipped)  # over v
    return found.value()


def can_start(rho: float, temp_student: float, temp_teacher: float) -> bool:
    """Whether training leaves the uniform assignment while the features stay what they are."""
    return rho > temp_teacher / temp_student


def run_can_start(rho: float, temp_student: float, temp_teacher: float) -> bool:
    """Whether a run leaves it, whose first features correlate rho: its trunk learns, and the slot
    loss helps, so that a little less than the ratio is enough [U].
    """
    return rho > RIPENING * temp_teacher / temp_student


def temperature_that_could(rho: float, temp_student: float) -> float:
    """A teacher temperature that can start: MARGIN rho temp_student, two digits, rounded down."""
    wanted = MARGIN * max(rho, 0.0) * temp_student
    if wanted <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(wanted)) - 1)
    return round(math.floor(wanted / unit + 1e-9) * unit, 12)


def verdict_of(rho: float, temp_student: float, temp_teacher: float) -> str:
    """One line for the person who started the run."""
    ratio = temp_teacher / temp_student
    if math.isnan(rho):
        return "the crops of the first images do not overlap: raise --min-overlap or --min-area"
    measured, threshold = f"views correlate {rho:.2f}", f"temp_teacher / temp_student = {ratio:.2f}"
    if rho > EDGE[1] * ratio:
        return f"{measured}, above {threshold}: the groups can start"
    other = temperature_that_could(rho, temp_student)
    if rho > EDGE[0] * ratio:
        return (
            f"{measured}, near {threshold}: the groups may start late or never; "
            f"--temp-teacher {other:g} could start"
        )
    advice = (
        f"--temp-teacher {other:g} could start"
        if rho >= LEAST
        else "no temperature could; take milder colors, larger crops or another trunk"
    )
    return (
        f"{measured}, below {threshold}: these temperatures cannot start on these images; {advice}"
    )
