"""What the notebooks share: the diagram, exercises, colors, checks, figures with captions.

A notebook begins with `sys.path[:0] = [".", "notebooks"]; import nb`, which works from its own
folder and from the root of the repository. Nothing of the method stands here.

    nb.method("slots")                     the diagram of the whole method, one box framed; boxes:
                                           views, student, teacher, similarity, aligned, slots,
                                           predictor, group loss, slot loss, total loss, center,
                                           average
    nb.exercise("attentive_pooling", mine) the reader's function against the module's on random
                                           tensors; what it is, and its wrong variants, stand in
                                           solutions.py; a number or list is compared as it is
    model, config, colors = nb.trained()   toy.pth as `SlotCon`, its configuration, and the colors
                                           (k 3) of its prototypes, by the rule of
    nb.class_colors(groups, truth, k)      (k 3): a prototype has the color of the class that it is
                                           matched with (`toy.CLASS_COLORS`), the others are gray
    nb.textures(seed)                      scenes, two views, and features that are no network's
    nb.paint(groups, colors)               numbers -> colors; a number k instead of colors: the
                                           palette of visualize.py
"""

import functools
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from einops import einsum, rearrange  # noqa: E402
from IPython.display import Image, Markdown, display  # noqa: E402
from PIL import Image as Pillow  # noqa: E402

import comparisons  # noqa: E402
import data  # noqa: E402
import recipes  # noqa: E402
import solutions  # noqa: E402
import toy  # noqa: E402
from comparisons.kmeans import nearest_center  # noqa: E402
from engine import checkpoints  # noqa: E402
from engine.options import chosen_for  # noqa: E402
from measures import metrics  # noqa: E402
from measures.datasets import UNSEEN  # noqa: E402
from measures.figures import color_groups, prototype_colors  # noqa: E402
from measures.groups import kmeans, segment, winner  # noqa: E402
from photometric import Photometric, normalize  # noqa: E402
from slotcon import SlotCon  # noqa: E402

torch.set_num_threads(1)
DPI = 160
plt.rcParams.update({"savefig.dpi": DPI, "font.size": 11, "figure.constrained_layout.use": True})


def check(name: str, condition: Any, message: str = "") -> None:
    """Print that a claim holds, or raise AssertionError. message: the numbers, shown either way."""
    numbers = f" ({message})" if message else ""
    if not bool(condition):
        raise AssertionError(f"check failed: {name}{numbers}")
    print(f"check passed: {name}{numbers}")


def exercise(name: str, attempt: Any) -> None:
    """Print todo (for None or ...), pass, or what is wrong; never raise, so that Run All goes on.

    attempt: a function, or a value; name: of `solutions.EXERCISES`.
    """
    print(f"exercise {name}: {solutions.result(name, attempt)}")


@functools.cache
def trained() -> tuple[SlotCon, recipes.Config, np.ndarray]:
    """The committed network in training mode, its configuration, the colors of its prototypes."""
    config, _ = recipes.parse(["--preset", "toy"])
    model = SlotCon(**chosen_for(SlotCon, config))
    model.load_state_dict(checkpoints.read(ROOT / "notebooks" / "toy.pth").contents["model"])
    scenes = toy.ToyImages(UNSEEN, 64)
    with torch.no_grad():
        groups, _ = segment(model.teacher.eval(), scenes.images)
    model.teacher.train()
    return model, config, class_colors(groups, scenes.semantic, config.num_prototypes)


def class_colors(groups: torch.Tensor, truth: torch.Tensor, k: int) -> np.ndarray:
    """groups, truth (...) -> colors (k 3) in 0..1, of the class matched one to one, else gray."""
    counts = metrics.confusion_matrix(groups, truth, k, len(toy.CLASS_NAMES))
    matched = metrics.match(counts)
    shades = np.linspace(0.3, 0.85, k)[np.arange(k) * 7 % k]
    of_class = toy.CLASS_COLORS[matched.clamp(min=0)] / 255
    return np.where((matched < 0)[:, None], shades[:, None], of_class)


def textures(seed: int, count: int = 128) -> tuple[Any, torch.Tensor, torch.Tensor, list]:
    """Scenes; two views in other colors (b v 3 y x); features (b d h w) of the scenes, and of both
    views with noise: mean sizes of 64 random filters' answers, d = 16 numbers of equal variance.
    """
    scenes, generator = toy.ToyImages(seed, count), torch.Generator().manual_seed(seed)
    filters = torch.randn(64, 1, 9, 9, generator=generator)
    filters = filters * torch.outer(*[torch.hann_window(9, periodic=False)] * 2)
    filters = F.normalize(filters - filters.mean((2, 3), keepdim=True), dim=(2, 3))
    recolor = Photometric(**chosen_for(Photometric, recipes.PRESETS["toy"]))
    views = recolor(torch.stack([scenes.images] * 2, dim=1), generator)
    maps = []
    for images in (normalize(scenes.images), *views.unbind(1)):
        gray = F.pad(images.mean(1, keepdim=True), (4,) * 4, mode="reflect")
        sizes = F.pad(F.conv2d(gray, filters).abs(), (4,) * 4, mode="reflect")
        maps.append(F.avg_pool2d(sizes, 12, 4)[:, :, ::2, ::2])
    rows = rearrange(maps[0], "b c h w -> (b h w) c")
    _, scale, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    whiten = axes[:16].T / scale[:16] * len(rows) ** 0.5
    maps = [x - rows.mean(0)[:, None, None] for x in maps]
    plain, *two = (einsum(x, whiten, "b c h w, c d -> b d h w") for x in maps)
    return scenes, views, plain, [x + torch.randn(x.shape, generator=generator) for x in two]


def method(box: str = "") -> None:
    """Show the diagram of the method with one of `method.BOXES` framed."""
    import method as diagram  # which imports this module

    display(Image(diagram.framed(box), format="png", width=900))
    display(Markdown("*One step of SlotCon; every image is a tensor of it. Red: here.*"))


def source(*things: Any) -> None:
    """Show the code of functions, classes or methods as it stands in the modules."""
    for thing in map(inspect.unwrap, things):
        file = Path(inspect.getsourcefile(thing)).resolve().relative_to(ROOT)
        code = textwrap.dedent(inspect.getsource(thing)).rstrip()
        display(Markdown(f"`{file}`:\n```python\n{code}\n```"))


def dial(draw: Callable[..., None], **knobs: tuple[Any, Sequence[Any]]) -> None:
    """Show draw at the starts; in Jupyter, sliders show the rest. knobs: name=(start, values)."""
    if "JPY_SESSION_NAME" not in os.environ:
        return draw(**{name: start for name, (start, _) in knobs.items()})
    from ipywidgets import SelectionSlider, interact  # comes with jupyter

    interact(draw, **{n: SelectionSlider(options=v, value=s) for n, (s, v) in knobs.items()})


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


def softmaxes(
    row: torch.Tensor, temperatures: dict[str, float], losses: dict[str, Sequence[float]], text: str
) -> None:
    """One row of similarities (k) as distributions at several temperatures, the first for scale;
    beside them the losses of runs against the uniform assignment's ln k.
    """
    row, first = row.sort(descending=True).values, next(iter(temperatures.values()))
    figure = plt.figure(figsize=(10, 3.4))
    places = figure.add_gridspec(1, len(temperatures) + 1, width_ratios=[1] * 3 + [1.5])
    for place, (name, temp) in zip(places, temperatures.items()):
        soft = (row / temp).softmax(0)
        axis = figure.add_subplot(place, ylim=(0, 0.8), xlabel="prototype, by similarity")
        axis.bar(range(len(soft)), soft, color="C0" if temp == first else "C1")
        words = f"entropy {torch.special.entr(soft).sum():.2f} nats\nfirst / third: "
        words += f"{soft[0] / soft[2]:.2f}"
        if temp != first:
            words += f"\n= student's to\nthe power {first / temp:.2f}"
        axis.text(0.97, 0.95, words, ha="right", va="top", fontsize=10, transform=axis.transAxes)
        axis.set_title(name, fontsize=11)
        if temp == first:
            axis.set_ylabel("share of the cell")
        else:
            axis.set_yticklabels([])
    axis = figure.add_subplot(places[-1], xlabel="step", ylabel="group loss")
    for (name, values), color in zip(losses.items(), ("C0", "C1")):
        axis.plot(values, color=color)
        place = dict(va="bottom", ha="right", color=color, fontsize=10)
        axis.text(len(values), max(values[-len(values) // 2 :]) + 0.06, name, **place)
    axis.axhline(np.log(len(row)), color="gray", ls="--", lw=1)
    axis.set(ylim=(1, 4))
    axis.set_title("why sharper: two runs,\nwithout and with it", fontsize=11)
    figure.suptitle("how much sharper, and why", fontsize=12)
    finish(text)


def entropies(runs: dict[str, dict[str, float]], text: str) -> None:
    """Runs, each with entropies `pixel` and `mean`, `nmi`, and `used`, in the plane of both."""
    plt.figure(figsize=(7.5, 4))
    for name, f in runs.items():
        x, y, words = f["pixel"], f["mean"], f"{name}: {f['used']} used"
        plt.scatter(x, y, c=f["nmi"], cmap="viridis", vmin=0, vmax=0.5, s=90, ec="black")
        if x > 2:  # labels stay off the line
            plt.annotate(words, (x - 0.09, y - 0.05), ha="right")
        else:
            plt.annotate(words, (x - 0.1, y + 0.12) if y - x > 0.3 else (x + 0.09, y - 0.14))
    plt.axline((0, 0), slope=1, color="gray", lw=1)
    corners = {"sure, many labels": (-0.05, 2.95), "one label": (1.4, -0.11)}
    corners["no label"] = (2.85, 2.65)
    for words, place in corners.items():
        plt.text(*place, words, style="italic", color="gray")
    plt.gca().set(xlabel="entropy of a pixel, nats", ylabel="entropy of the mean, nats")
    plt.gca().set(xlim=(-0.15, 3.4), ylim=(-0.25, 3.15))
    plt.colorbar(label="NMI with the classes")
    finish(text)


def powers(xs: Sequence[int], lines: dict[str, Sequence[float]], text: str, **more: Any) -> None:
    """Lines over powers of two, on a logarithmic axis. more: what `axis.set` takes."""
    _, axis = plt.subplots(figsize=(6.5, 3.2))
    for (name, values), marker in zip(lines.items(), "os"):
        axis.semilogx(xs, values, marker=marker, base=2, label=name)
    axis.set(ylim=(0, None), xticks=xs, xticklabels=xs, **more)
    axis.legend()
    finish(text)


def kept(first: torch.Tensor, second: torch.Tensor, k: int) -> np.ndarray:
    """Groups of the same places in two views (n y x) -> (k) the share of each group's pixels, in
    either view, that are in it in both; nan for a group without a pixel.
    """
    both, either = first[first == second], torch.cat([first, second])
    sizes = (x.flatten().bincount(minlength=k).numpy() for x in (both, either))
    with np.errstate(invalid="ignore"):
        return 2 * next(sizes) / next(sizes)


def agreement(
    columns: dict[str, Sequence[Any]], shares: Sequence[float], colors: Any, by_color: Any,
    text: str,
) -> None:
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
            if row == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"view {row + 1}")
    axis = figure.add_subplot(places[2, :], xticks=[], ylim=(0, 1.12), ylabel="share kept")
    drawn = axis.bar(range(len(shares)), shares, color=colors, width=0.5)
    axis.bar_label(drawn, fmt="{:.0%}")
    axis.axhspan(np.nanmin(by_color), np.nanmax(by_color), color="black", alpha=0.25, lw=0)
    words = f"8 clusters of color keep {np.nanmin(by_color):.0%} to {np.nanmax(by_color):.0%}"
    axis.text(len(shares) - 0.5, np.nanmax(by_color) + 0.02, words, ha="right", va="bottom",
              bbox=dict(facecolor="w", alpha=0.85, lw=0, pad=1))  # fmt: skip
    axis.set(xlim=(-0.5, len(shares) - 0.5))
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


def measured(file: str, row: str, column: int) -> list[float]:
    """The numbers in one cell of a table in benchmarks/, such as median, least and most."""
    table = (ROOT / "benchmarks" / file).read_text()
    line = re.search(rf"^\| {re.escape(row)} \|(.*)", table, re.M)
    return [float(number) for number in re.findall(r"\d\.\d+", line[1].split("|")[column])]


def painted(kind: str, images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What slots_<kind>.pth paint of images (n c y x), (n c y/2 x/2) with normalize(x) / 4 + 0.5,
    and which slot wins each pixel in the last round (n y x). Slots start from the seed's noise.
    """
    name = {"flow": "motion", "depth": "depth"}.get(kind, "slot_attention")
    system = comparisons.build(name, trained()[1]).eval()
    file = ROOT / "notebooks" / f"slots_{kind}.pth"
    system.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        torch.manual_seed(seed)
        image = rearrange(system.paint(normalize(images))[0], "n c (y x) -> n c y x", y=32)
        torch.manual_seed(seed)
        owner = winner(system.maps(normalize(images)), images.shape[-2:])
    return image / 4 + 0.5, owner


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


def clusters_of(pixels: torch.Tensor, k: int) -> torch.Tensor:
    """Pixels (c y x) of one image -> the number of each pixel's cluster (y x), by k-means."""
    rows = rearrange(pixels.float(), "c y x -> (y x) c")
    centers = kmeans(rows.numpy(), min(k, len(rows.unique(dim=0))))
    return nearest_center(rows, torch.from_numpy(centers).float()).reshape(pixels.shape[1:])


def borders(axis: Any, rows: torch.Tensor, columns: torch.Tensor, marked: torch.Tensor) -> None:
    """Lines where sorted numbers of rows and of columns change; a dot in each row at a column."""
    for numbers, line in ((rows, axis.axhline), (columns, axis.axvline)):
        for edge in numbers.diff().nonzero()[:, 0].tolist():
            line(edge + 0.5, color="black", lw=0.3)
    axis.plot(marked, range(len(marked)), "k.", ms=0.5)


def in_colors(groups: torch.Tensor, regions: torch.Tensor) -> list:
    """Groups of single images (n y x), each in the color of the region that it covers best."""
    return [color_groups(*pair)[0] for pair in zip(groups.split(1), regions.long().split(1))]


def photograph(row: int) -> np.ndarray:
    """One of the three photographs in docs/images/photos.jpg, reduced: uint8 (3 64 64)."""
    with Pillow.open(ROOT / "docs" / "images" / "photos.jpg") as sheet:
        top = (57, 317, 577)[row]
        square = sheet.crop((7, top, 213, top + 206)).resize((64, 64), Pillow.Resampling.BOX)
    return np.moveaxis(np.asarray(square), -1, 0).copy()


def photographs(text: str) -> None:
    """Show docs/images/photos.jpg, reduced, and a text below it."""
    small = io.BytesIO()
    with Pillow.open(ROOT / "docs" / "images" / "photos.jpg") as sheet:
        sheet.resize((800, 800 * sheet.height // sheet.width)).save(small, "jpeg", quality=75)
    display(Image(small.getvalue(), format="jpeg"), Markdown(f"*{text}*"))


def as_image(image: Any) -> np.ndarray:
    """(3 y x), (y x 3) or (y x), tensor or array -> (y x 3) or (y x) array."""
    array = np.asarray(image)
    return np.moveaxis(array, 0, -1) if len(array) == 3 and array.ndim == 3 else array


def grid(
    rows: Sequence[Sequence[Any]], text: str, titles: Sequence = (), labels: Sequence = (),
    size: float = 1.35, cmap: str = "viridis", limits: tuple[float, float] | None = None,
    legend: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Rows of images. limits: of (y x) maps, else each has its own; legend: of colors, uint8."""
    columns, (low, high) = max(map(len, rows)), limits or (0, None)
    shape = size * columns + 0.5, size * len(rows) + 0.3
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=shape)
    for axis, image in zip(axes.flat, itertools.chain(*rows)):
        axis.imshow(as_image(image), cmap, vmin=low, vmax=high, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="gray", lw=0.6)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label)
    if legend:
        patches = [plt.Rectangle((0, 0), 1, 1, color=np.asarray(c) / 255) for c in legend.values()]
        where = dict(loc="outside lower center", ncols=len(patches), columnspacing=1)
        figure.legend(patches, list(legend), frameon=False, handlelength=1, **where)
    finish(text)


def label(axes: Any, rows: Sequence = (), columns: Sequence = ()) -> None:
    """Names of the rows and columns of axes (r c) of images, which lose their ticks."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], rows):
        axis.set_ylabel(name)
    for axis, name in zip(axes[0], columns):
        axis.set_title(name)


def dots(
    rows: dict[str, dict[str, Any]], text: str, xlabel: str = "", width: float = 7.5,
    bold: str = "", zero: bool = False, order: Sequence[str] = (), **more: Any,
) -> None:  # fmt: skip
    """Rows of named numbers as dots. A number, or median, least and most, drawn as a line; bold:
    a row; zero: a line at 0; order: of the names, so that figures give them the same colors; more:
    title; number: a format, to write every number above its dot; limits: of the axis, a number
    below them stands at its end as an arrow; shift: by how much the names stand apart within a row,
    so that no dot hides another.
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
    finish(text)


def dots_and_table(
    values: dict[str, float], columns: dict[str, Sequence[str]], text: str, xlabel: str, over: str,
    note: str, limits: tuple[float, float],
) -> None:  # fmt: skip
    """One number per row as a dot; beside it what a table says of the row, its name above, a note
    below. columns: head -> words, one per row.
    """
    figure, axis = plt.subplots(figsize=(4.6, 0.5 * len(values) + 1.1))
    figure.set_layout_engine("none")  # the words stand outside the axes
    beside = dict(transform=axis.get_yaxis_transform(), ha="center", va="center")
    for y, value in enumerate(values.values()):
        axis.plot(value, y, "o", color="C0")
        axis.text(value, y - 0.2, f"{value:.1f}", ha="center", va="bottom", fontsize=10)
    for x, (head, words) in zip(np.arange(len(columns)) * 0.36 + 1.2, columns.items()):
        axis.text(x, -0.85, head, weight="bold", **beside)
        for y, word in enumerate(words):
            axis.text(x, y, word, **beside)
    middle = 1.2 + 0.18 * (len(columns) - 1)
    axis.text(middle, -1.5, over, **beside)
    axis.text(middle, len(values) + 0.05, note, style="italic", **beside)
    axis.set_yticks(range(len(values)), list(values))
    axis.set(xlabel=xlabel, xlim=limits, ylim=(len(values) - 0.5, -0.7))
    axis.grid(axis="y", alpha=0.3)
    finish(text)


def heat(
    matrix: Any, text: str, rows: Sequence = (), columns: Sequence = (),
    limits: tuple | None = None, size: tuple[float, float] = (5.5, 4.0), numbers: int = 50,
    **names: str,
) -> None:  # fmt: skip
    """A matrix as colors, a small one with its numbers. rows, columns: names of the ticks; text:
    "" leaves the figure open, for what is drawn over it; numbers: less cells than this are small;
    names: xlabel, ylabel.
    """
    array, paper = np.asarray(matrix, dtype=float), dict(facecolor="w", alpha=0.8, lw=0, pad=1)
    low, high = limits or (array.min(), array.max())
    figure, axis = plt.subplots(figsize=size)
    figure.colorbar(axis.imshow(array, "coolwarm" if low < 0 else "viridis", vmin=low, vmax=high))
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


def bars(
    values: dict[str, float], text: str, ylabel: str = "", size: tuple = (5.5, 2.8), **more: Any
) -> None:
    """Named numbers as bars, each with its value. more: of `finish`."""
    _, axis = plt.subplots(figsize=size)
    axis.bar_label(axis.bar(list(values), list(values.values())), fmt="%.2f")
    axis.set_ylabel(ylabel)
    axis.margins(y=0.15)
    finish(text, **more)


def paint(numbers: Any, colors: int | np.ndarray) -> np.ndarray:
    """Numbers of groups (... y x) -> (... y x 3) in 0..1. colors: (k 3), or k."""
    palette = prototype_colors(colors) if isinstance(colors, int) else colors
    return palette[np.asarray(numbers)]
