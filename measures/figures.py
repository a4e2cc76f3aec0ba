"""Figures of what was learned: segments of prototypes, groups, soft assignments, features."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.colors import hsv_to_rgb, to_rgba_array
from matplotlib.figure import Figure  # draws into files, without a window
from matplotlib.patches import Patch
from matplotlib.text import Text
from torch import Tensor

from engine.files import write_atomically
from grouping import GroupingNetwork, assignment
from measures import metrics
from measures.groups import winner
from measures.metrics import UNMATCHED
from measures.retrieval import Retrieval
from photometric import normalize

# Okabe and Ito (2008), then colors far from all before them: up to the 13th with every kind of
# color vision, then by CIEDE2000; none is near gray, black or white
FIRST_COLORS = """
    #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7 #870f69 #a50fff #3c0fd2 #00f0c3 #8778f0
    #a51e00 #78691e #4bd200 #ff1e4b #ffa587 #1e7800 #69f0ff #a5a54b #ff2dff #a54b5a #3c8796 #00b4b4
""".split()
ONLY_HERE = "in this figure only"  # where k is larger: another figure has other most used ones


def prototype_colors(k: int, use: Tensor | None = None) -> np.ndarray:
    """The colors of prototypes 0..k-1 in 0..1, (k 3), the best separated ones first, or, where
    these do not suffice for all, for the most used. use (k): how much each is used.
    """
    random = np.random.default_rng(0)  # hue, saturation, value; prototype by prototype
    colors = hsv_to_rgb(random.uniform((0, 0.6, 0.5), (1, 1, 0.9), (k, 3)))
    colors[: len(FIRST_COLORS)] = to_rgba_array(FIRST_COLORS)[:k, :3]
    if use is not None and k > len(FIRST_COLORS):
        colors[use.argsort(descending=True, stable=True).cpu()] = colors.copy()
    return colors


def color_groups(
    groups: Tensor, truth: Tensor, owner: Sequence[int | None] | None = None
) -> np.ndarray:
    """Groups (n y x) in the colors that `prototype_colors` has for truth (n y x), as (n y x 3).

    A group has the color of the class that it is matched with, one to one; the others have the
    next colors, by use. owner: the group of each class; None: as these images are matched best.
    """
    k, t = int(groups.max()) + 1, len(owner) if owner else int(truth.max()) + 1
    counts = metrics.confusion_matrix(groups, truth, k, t)
    classes = metrics.match(counts)
    if owner:
        classes = torch.tensor([owner.index(g) if g in owner else UNMATCHED for g in range(k)])
    use = counts.sum(1).masked_fill(classes != UNMATCHED, -1)  # over t
    others = use.argsort(descending=True, stable=True)[: int((use >= 0).sum())]
    classes[others] = torch.arange(t, t + len(others))
    return prototype_colors(t + k)[classes[groups.long()]]


def as_images(images: Tensor) -> np.ndarray:
    """images (b 3 y x) uint8 -> (b y x 3) in 0..1."""
    return rearrange(images, "b rgb y x -> b y x rgb").cpu().numpy() / 255


def save(figure: Figure, file: Path, dpi: int) -> None:
    """Write a figure; a "$" in a name begins no formula. Raises OSError that names the file."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    form = file.suffix[1:].lower()
    write_atomically(file, lambda out: figure.savefig(out, dpi=dpi, format=form))


Cell = np.ndarray | tuple[str, np.ndarray] | None  # image (y x 3) in 0..1, below a caption


def grid(
    title: str, rows: Sequence[Sequence[Cell]], names: Sequence[str] = (), side: float = 1.5,
    legend: Mapping[str, Any] = {},
) -> Figure:  # fmt: skip
    """Rows of images. names: of the rows; side: of a cell, inches; legend: colors by meaning."""
    columns = max(4, *map(len, rows))  # a title needs the width of four
    width = side * columns + 0.1 * max(map(len, names), default=0)
    figure = Figure((width, 1.1 * side * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    bare = dict(xticks=[], yticks=[], frame_on=False)
    axes = figure.subplots(len(rows), columns, squeeze=False, subplot_kw=bare)
    for row, cells in zip(axes, rows):
        for axis, cell in zip(row, cells):
            if cell is not None:
                caption, image = cell if isinstance(cell, tuple) else ("", cell)
                axis.set_title(caption, fontsize=8)
                axis.imshow(image, interpolation="nearest")
    for row, name in zip(axes, names):
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    if legend:
        handles = [Patch(facecolor=color) for color in legend.values()]
        figure.legend(handles, legend, loc="outside lower center", ncols=4, frameon=False)
    return figure


@torch.no_grad()
def segment_of(network: GroupingNetwork, image: Tensor, prototype: int) -> Tensor:
    """The pixels of image (3 y x) uint8 that belong to a prototype, (y x) bool."""
    _, similarity = network(normalize(image[None].to(network.prototypes.weight.device)))
    similarity, size = similarity.cpu(), image.shape[-2:]
    mask = winner(similarity, size)[0] == prototype
    if mask.any():
        return mask
    # A single cell can lose all pixels to its neighbors when maps are enlarged: it is shown itself.
    cells = (similarity.argmax(dim=1, keepdim=True) == prototype).float()  # over k
    return F.interpolate(cells, size)[0, 0] > 0


def draw_prototypes(
    file: Path, network: GroupingNetwork, images: Sequence[Tensor], view: Callable,
    found: Retrieval, chosen: Sequence[int],
) -> None:  # fmt: skip
    """One column per prototype, the best segment on top: in a line, all else gray."""
    colors, top = prototype_colors(len(found.cells), found.cells), found.images.shape[1]
    used = int((found.active > 0).sum())
    title = f"{len(chosen)} prototypes ({used} are in use): the {top} segments that are\n"
    title += "the most similar to each, best on top, in a line of its color"
    title += f"\n(the color {ONLY_HERE})" * (len(colors) > len(FIRST_COLORS))
    figure = grid(title, [[None] * len(chosen)] * top, side=1.3)
    for k, column in zip(chosen, np.reshape(figure.axes, (top, -1)).T):
        column[0].set_title(f"prototype {k}\nin {int(found.active[k])} images", fontsize=8)
        for axis, index in zip(column, (i for i in found.images[k].tolist() if i >= 0)):
            image = view(images[index])
            mask, picture = segment_of(network, image, k).numpy(), as_images(image[None])[0]
            # A little of the color, since what is inside can be white or gray itself
            inside = 0.8 * picture + 0.2 * colors[k]
            axis.imshow(np.where(mask[..., None], inside, pale(picture)), interpolation="nearest")
            if mask.any() and not mask.all():
                axis.contour(mask, levels=[0.5], colors=[colors[k]], linewidths=1.2)
    save(figure, file, 120)


def principal_colors(embeddings: Tensor, size: tuple[int, int]) -> Tensor:
    """embeddings (b d h w) -> their principal components as colors (b y x 3) in 0..1."""
    b, _, h, w = embeddings.shape
    rows = rearrange(embeddings, "b d h w -> (b h w) d")
    rows = F.normalize(rows, dim=1)  # over d: cosines are what the method compares
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    parts = F.pad(rows @ directions.T, (0, 3 - len(directions)))
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    parts = ((parts - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    maps = rearrange(parts, "(b h w) rgb -> b rgb h w", b=b, h=h, w=w)
    enlarged = F.interpolate(maps, size, mode="bicubic").clamp(0, 1)
    return rearrange(enlarged, "b rgb y x -> b y x rgb")


def pale(image: np.ndarray) -> np.ndarray:
    """A gray copy (y x 1) of image (y x 3) in 0..1, in which dark photographs are light."""
    return 0.6 + 0.4 * image.mean(axis=2, keepdims=True)  # over rgb


def tint(image: np.ndarray, color: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """A pale copy of image (y x 3) in 0..1, colored where `sure` (y x) in 0..1 is high."""
    gray, sure = pale(image), sure[..., None]
    return (gray * (1 - sure) + (0.25 * gray + 0.75 * np.asarray(color)) * sure).clip(0, 1)


@torch.no_grad()
def draw_parts(
    file: Path, network: GroupingNetwork, images: Tensor, temperature: float, slots: int = 4,
    use: Tensor | None = None,
) -> None:  # fmt: skip
    """A row per image (b 3 y x) uint8: groups, soft slots, features. use (k): as in
    `prototype_colors`; by default, the pixels in these images.
    """
    k, size = network.prototypes.num_embeddings, images.shape[-2:]
    shown = normalize(images.to(network.prototypes.weight.device))
    embeddings, similarity = (each.cpu() for each in network(shown))
    groups, maps = winner(similarity, size), assignment(similarity, temperature)
    colors = prototype_colors(k, groups.flatten().bincount(minlength=k) if use is None else use)
    features, rows = principal_colors(embeddings.float(), size).numpy(), []
    for image, ids, soft, feature in zip(as_images(images), groups, maps, features):
        enlarged = F.interpolate(soft[None], size, mode="bilinear")[0].numpy()
        mass = reduce(soft, "k h w -> k", "mean")
        cells = [("image", image), (f"{len(ids.unique())} groups", colors[ids])]
        for slot in mass.topk(min(slots, k)).indices.tolist():
            drawn = tint(image, colors[slot], enlarged[slot])
            cells.append((f"slot {slot}: {float(mass[slot]):.0%}", drawn))
        rows.append([*cells, ("features (PCA)", feature)])
    where = f", {ONLY_HERE}" * (k > len(FIRST_COLORS))
    title = f"A color is one prototype{where}. Slot: how much a place (%: the image) belongs to it."
    save(grid(title, rows, side=1.7), file, 130)
