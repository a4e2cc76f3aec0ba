"""Figures that one notebook each has, in the order of the notebooks."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor, special

import data
from plots import as_image, finish, label


def errors(
    rows: Sequence[Sequence[Any]], shares: Sequence[dict[str, float]], text: str,
    titles: Sequence[str], labels: Sequence[str], last: str,
) -> None:  # fmt: skip
    """Rows of images (maps of errors: dark 0, bright 0.4 and more), each with named shares as bars.

    last: the title of the last row's bars.
    """
    shape = dict(figsize=(9.2, 5.2), width_ratios=(1, 1, 1, 1, 1.9))
    _, axes = plt.subplots(len(rows), 5, **shape)
    for line, images, named in zip(axes, rows, shares):
        for axis, image in zip(line, images):
            axis.imshow(as_image(image), "magma", vmin=0, vmax=0.4, interpolation="nearest")
        line[4].barh([1, 0], list(named.values()), color=("silver", "palegreen"))
        line[4].set(xlim=(0, 1), ylim=(-0.6, 1.6))
        for y, (name, value) in zip((1, 0), named.items()):
            line[4].text(0.03, y, f"{value:.0%} {name}", va="center")
    label(axes, labels, titles)
    axes[-1, 4].set_title(last)
    finish(text)


def softmaxes(
    row: Tensor, temperatures: dict[str, float], losses: dict[str, Sequence[float]], text: str
) -> None:
    """One row of similarities (k) as distributions at several temperatures, the first for scale;
    beside them the losses of runs against the uniform assignment's ln k.
    """
    row, first = row.sort(descending=True).values, next(iter(temperatures.values()))
    widths = [1] * len(temperatures) + [1.5]
    figure, axes = plt.subplots(1, len(widths), figsize=(10, 3.4), width_ratios=widths)
    for axis, (name, temp) in zip(axes, temperatures.items()):
        soft = (row / temp).softmax(0)
        axis.bar(range(len(soft)), soft, color="C0" if temp == first else "C1")
        words = f"entropy {special.entr(soft).sum():.2f} nats\nfirst / third: "
        words += f"{soft[0] / soft[2]:.2f}"
        if temp != first:
            words += f"\n= student's to\nthe power {first / temp:.2f}"
            axis.set_yticklabels([])
        axis.text(0.97, 0.95, words, ha="right", va="top", fontsize=10, transform=axis.transAxes)
        axis.set(ylim=(0, 0.8), xlabel="prototype, by similarity")
        axis.set_title(name, fontsize=11)
    axes[0].set_ylabel("share of the cell")
    axis = axes[-1]
    for (name, values), color in zip(losses.items(), ("C0", "C1")):
        axis.plot(values, color=color)
        place = dict(va="bottom", ha="right", color=color, fontsize=10)
        axis.text(len(values), max(values[-len(values) // 2 :]) + 0.06, name, **place)
    axis.axhline(np.log(len(row)), color="gray", ls="--", lw=1)
    axis.set(ylim=(1, 4), xlabel="step", ylabel="group loss")
    axis.set_title("why sharper: two runs,\nwithout and with it", fontsize=11)
    figure.suptitle("how much sharper, and why", fontsize=12)
    finish(text)


def entropies(runs: dict[str, dict[str, float]], text: str) -> None:
    """Runs, each with entropies `pixel` and `mean`, `nmi`, and `used`, in the plane of both."""
    _, axis = plt.subplots(figsize=(7.5, 4))
    for name, f in runs.items():
        x, y, words = f["pixel"], f["mean"], f"{name}: {f['used']} used"
        dot = axis.scatter(x, y, c=f["nmi"], cmap="viridis", vmin=0, vmax=0.5, s=90, ec="black")
        if x > 2:  # labels stay off the line
            axis.annotate(words, (x - 0.09, y - 0.05), ha="right")
        else:
            axis.annotate(words, (x - 0.1, y + 0.12) if y - x > 0.3 else (x + 0.09, y - 0.14))
    axis.axline((0, 0), slope=1, color="gray", lw=1)
    axis.text(-0.05, 2.95, "sure, many labels", style="italic", color="gray")
    axis.text(1.4, -0.11, "one label", style="italic", color="gray")
    axis.text(2.85, 2.65, "no label", style="italic", color="gray")
    axis.set(xlabel="entropy of a pixel, nats", ylabel="entropy of the mean, nats")
    axis.set(xlim=(-0.15, 3.4), ylim=(-0.25, 3.15))
    plt.colorbar(dot, label="NMI with the classes")
    finish(text)


def show_crops(axes: Any, image: Any, pair: Sequence[tuple], mirrored: Sequence[bool]) -> None:
    """A scene with two crops (top, left, height, width), both views, the shared part in white."""

    def outline(axis, left, top, width, height, color):
        style = dict(fill=False, ec=color, lw=2.5)
        axis.add_patch(plt.Rectangle((left - 0.5, top - 0.5), width, height, **style))

    axes[0].imshow(as_image(image))
    shared, colors = data.overlap_boxes(*pair, mirrored), ("#ff8800", "#00a0ff")
    for axis, crop, box, flip, color in zip(axes[1:], pair, shared, mirrored, colors):
        outline(axes[0], crop[1], crop[0], crop[3], crop[2], color)
        axis.imshow(as_image(data.resized_crop(image, crop, 48, flip)))
        outline(axis, *(48 * box[:2]).tolist(), *(48 * (box[2:] - box[:2])).tolist(), "w")
        axis.set_title("mirrored" if flip else "")


def agreement(
    columns: dict[str, Sequence[Any]], shares: Sequence[float], colors: Any, by_color: Any,
    text: str,
) -> None:  # fmt: skip
    """Columns of a prototype's pixels in two views, and below each the share that stays its own.

    by_color: the same shares for clusters of color: a band from the least to the most.
    """
    figure = plt.figure(figsize=(8.6, 4.9))
    words = "what a prototype becomes: what both views agree about,\nthe texture and not the color"
    figure.suptitle(words)
    places = figure.add_gridspec(3, len(columns), height_ratios=(1, 1, 1.5))
    for column, (name, images) in enumerate(columns.items()):
        for row, image in enumerate(images):
            axis = figure.add_subplot(places[row, column], xticks=[], yticks=[])
            axis.imshow(as_image(image), interpolation="nearest")
            axis.set_title("" if row else name, fontsize=10)
            axis.set_ylabel("" if column else f"view {row + 1}")
    axis = figure.add_subplot(places[2, :], xticks=[], ylim=(0, 1.12), ylabel="share kept")
    axis.bar_label(axis.bar(range(len(shares)), shares, color=colors, width=0.5), fmt="{:.0%}")
    least, most, end = np.nanmin(by_color), np.nanmax(by_color), len(shares) - 0.5
    axis.axhspan(least, most, color="black", alpha=0.25, lw=0)
    paper = dict(facecolor="w", alpha=0.85, lw=0, pad=1)
    words = f"8 clusters of color keep {least:.0%} to {most:.0%}"
    axis.text(end, most + 0.02, words, ha="right", va="bottom", bbox=paper)
    axis.set(xlim=(-0.5, end))
    finish(text)
