"""Figures of several notebooks, each with a caption below it, and the colors of groups."""

import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown, display
from PIL import Image as Pillow
from torch import Tensor

import toy
from measures import metrics
from measures.figures import prototype_colors

CLASS_COLORS = np.uint8(prototype_colors(len(toy.CLASS_NAMES)) * 255 + 0.5)  # as in groups.png

plt.rcParams.update({"savefig.dpi": 160, "font.size": 11, "figure.constrained_layout.use": True})


def finish(text: str, marks: dict[str, float] | None = None) -> None:
    """Show the current figure, and below it what is drawn and what to look at.

    marks: name -> height of a dashed line.
    """
    for name, value in (marks or {}).items():
        plt.axhline(value, color="gray", ls="--", lw=1)
        where = dict(va="center", transform=plt.gca().get_yaxis_transform())
        plt.text(1.01, value, name, **where)
    drawn, small = io.BytesIO(), io.BytesIO()
    plt.savefig(drawn, format="png", bbox_inches="tight")
    plt.close()
    picture = few_colors(Pillow.open(drawn))
    picture.save(small, format="png", optimize=True)
    size = dict(width=picture.width // 2, height=picture.height // 2)  # twice as sharp
    display(Image(small.getvalue(), format="png", **size), Markdown(f"*{text}*"))


def few_colors(picture: Pillow.Image, refine: int = 0) -> Pillow.Image:
    """At most 256 colors, which take a third of the bytes. refine: rounds of k-means."""
    return picture.convert("RGB").quantize(256, kmeans=refine, dither=Pillow.Dither.NONE)


def as_image(image: Any) -> np.ndarray:
    """(3 y x), (y x 3) or (y x), tensor or array -> (y x 3) or (y x) array."""
    array = np.asarray(image)
    return np.moveaxis(array, 0, -1) if len(array) == 3 and array.ndim == 3 else array


def class_colors(groups: Tensor, truth: Tensor, k: int) -> np.ndarray:
    """groups, truth (...) -> colors (k 3) in 0..1, of the class matched one to one, else gray."""
    counts = metrics.confusion_matrix(groups, truth, k, len(toy.CLASS_NAMES))
    matched = metrics.match(counts)
    shades = np.linspace(0.3, 0.85, k)[np.arange(k) * 7 % k]
    of_class = CLASS_COLORS[matched.clamp(min=0)] / 255
    return np.where((matched < 0)[:, None], shades[:, None], of_class)


def paint(numbers: Any, colors: int | np.ndarray) -> np.ndarray:
    """Numbers of groups (... y x) -> (... y x 3) in 0..1. colors: (k 3), or k."""
    palette = prototype_colors(colors) if isinstance(colors, int) else colors
    return palette[np.asarray(numbers)]


def label(axes: np.ndarray, rows: Sequence = (), columns: Sequence = ()) -> None:
    """Names of the rows and columns of axes (r c) of images, which lose their ticks."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], rows):
        axis.set_ylabel(name)
    for axis, name in zip(axes[0], columns):
        axis.set_title(name)


def grid(
    rows: Sequence[Sequence[Any]], text: str, titles: Sequence = (), labels: Sequence = (),
    size: float = 1.35, cmap: str = "viridis", limits: tuple[float, float] | None = None,
    legend: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Rows of images. limits: of (y x) maps, else each has its own; legend: of colors, uint8."""
    columns, (low, high) = max(map(len, rows)), limits or (0, None)
    shape = size * columns + 0.5, size * len(rows) + 0.3
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=shape)
    label(axes, labels, titles)
    for axis, image in zip(axes.flat, itertools.chain(*rows)):
        axis.imshow(as_image(image), cmap, vmin=low, vmax=high, interpolation="nearest")
        axis.spines[:].set(color="gray", lw=0.6)
    if legend:
        patches = [plt.Rectangle((0, 0), 1, 1, color=np.asarray(c) / 255) for c in legend.values()]
        where = dict(loc="outside lower center", ncols=len(patches), columnspacing=1)
        figure.legend(patches, list(legend), frameon=False, handlelength=1, **where)
    finish(text)


def dots(
    rows: dict[str, dict[str, Any]], text: str, xlabel: str = "", width: float = 7.5,
    bold: str = "", zero: bool = False, order: Sequence[str] = (), **more: Any,
) -> None:  # fmt: skip
    """Rows of named numbers as dots. A number, or median, least and most, drawn as a line; bold:
    a row; zero: a line at 0; order: of the names, so that figures give them the same colors; more:
    title; number: a format, to write every number above its dot; limits: of the axis, a number
    below them stands at its end as an arrow; shift: by how much the names stand apart within a row,
    so that no dot hides another. text "" leaves the figure open.
    """
    number, limits, shift = more.get("number"), more.get("limits"), more.get("shift", 0.0)
    names = list(dict.fromkeys([*order, *(name for values in rows.values() for name in values)]))
    _, axis = plt.subplots(figsize=(width, 1.1 + (0.42 if shift else 0.32) * len(rows)))
    if zero:
        axis.axvline(0, color="black", lw=1)
    for row, values in enumerate(rows.values()):
        for name, value in values.items():
            y = row + shift * (names.index(name) - (len(names) - 1) / 2)
            color, shape = f"C{names.index(name)}", "osD^v"[names.index(name) % 5]
            middle, *ends = np.ravel(value)
            axis.plot(ends, [y] * len(ends), color=color, lw=2)
            if limits and middle < limits[0]:
                place = dict(va="center", fontsize=9, color=color)
                axis.text(limits[0], y, f" \u2190 {name}: {middle:.1f}", **place)
                continue
            axis.plot(middle, y, shape, color=color, label=name)
            if number:
                above = dict(ha="center", va="bottom", fontsize=9, color=color)
                axis.text(middle, y - 0.13, format(middle, number), **above)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set(ylim=(len(rows) - 0.5, -0.5 - 0.2 * bool(number)), xlabel=xlabel, xlim=limits)
    axis.grid(axis="y", alpha=0.3)
    axis.set_title(more.get("title", ""))
    for tick in axis.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() == bold else "normal")
    if len(names) > 1:
        first = dict(zip(*reversed(axis.get_legend_handles_labels())))
        beside = dict(bbox_to_anchor=(1, 1), loc="upper left", frameon=False, fontsize=9)
        axis.legend([first[n] for n in names if n in first], filter(first.get, names), **beside)
    if text:
        finish(text)


def heat(
    matrix: Any, text: str, rows: Sequence = (), columns: Sequence = (), color: str = "",
    limits: tuple | None = None, size: tuple[float, float] = (5.5, 4.0), numbers: int = 50,
    **names: str,
) -> None:  # fmt: skip
    """A matrix as colors, a small one with its numbers. rows, columns: names of the ticks; color:
    what a color means; text: "" leaves the figure open, for what is drawn over it; numbers: less
    cells than this are small; names: xlabel, ylabel.
    """
    array, paper = np.asarray(matrix, dtype=float), dict(facecolor="w", alpha=0.8, lw=0, pad=1)
    low, high = limits or (array.min(), array.max())
    figure, axis = plt.subplots(figsize=size)
    shown = axis.imshow(array, "coolwarm" if low < 0 else "viridis", vmin=low, vmax=high)
    figure.colorbar(shown, label=color)
    axis.set(**names, aspect="auto")
    axis.set_yticks(range(len(rows)), map(str, rows))
    axis.set_xticks(range(len(columns)), map(str, columns))
    for (i, j), value in np.ndenumerate(array) if array.size < numbers else ():
        size = 11 if array.size < 50 else 8
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", bbox=paper, fontsize=size)
    if text:
        finish(text)


def curves(lines: dict[str, Sequence[float]], text: str, ylabel: str = "", **more: Any) -> None:
    """Several lines over the steps, each with its own marker. more: of `finish`."""
    _, axis = plt.subplots(figsize=(6.0, 3.2))
    for (name, values), marker in zip(lines.items(), "os^Dv*"):
        axis.plot(values, marker=marker, label=name, ms=4, markevery=len(values) // 8)
    axis.set(xlabel="step", ylabel=ylabel)
    beside = dict(bbox_to_anchor=(1.1, 1), loc="upper left") if len(lines) > 4 else {}
    axis.legend(fontsize=9, **beside)
    finish(text, **more)


def powers(xs: Sequence[int], lines: dict[str, Sequence[float]], text: str, **more: Any) -> None:
    """Lines over powers of two, on a logarithmic axis. more: what `axis.set` takes."""
    _, axis = plt.subplots(figsize=(6.5, 3.2))
    for (name, values), marker in zip(lines.items(), "os"):
        axis.semilogx(xs, values, marker=marker, base=2, label=name)
    axis.set(ylim=(0, None), xticks=xs, xticklabels=xs, **more)
    axis.legend()
    finish(text)


def bars(
    values: dict[str, float], text: str, ylabel: str = "", size: tuple = (5.5, 2.8), **more: Any
) -> None:
    """Named numbers as bars, each with its value. more: of `finish`."""
    _, axis = plt.subplots(figsize=size)
    axis.bar_label(axis.bar(list(values), list(values.values())), fmt="%.2f")
    axis.set_ylabel(ylabel)
    axis.margins(y=0.15)
    finish(text, **more)
