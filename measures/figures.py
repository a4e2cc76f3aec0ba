"""Figures of what was learned: segments of prototypes, groups, soft assignments, features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure  # draws into files, without a window
from matplotlib.patches import Patch
from torch import Tensor

from grouping import GroupingNetwork, assignment
from measures.groups import winner
from measures.metrics import IGNORE
from measures.retrieval import Retrieval
from photometric import normalize

# Okabe and Ito (2008), then colors that are far from all before them with every kind of color
# vision; none is pale or near gray
FIRST_COLORS = """
    #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7 #69001e #3c0096 #4bfff0 #a53cff #b40069
    #4b5a00 #001ee1 #00e187 #9687ff #780fb4 #691e69 #c32db4 #a55a87 #a5ff96 #96b469 #ffa5c3 #a5c3ff
""".split()
GOLDEN = (math.sqrt(5) - 1) / 2  # of the circle of hues: the next hue is far from the last ones
GRAY = (0.63, 0.63, 0.63)  # what has no prototype
RED = (0.9, 0.1, 0.1)  # of a retrieved segment, as on the slide
PER_PAGE = 12  # columns of prototypes, rows of images


def prototype_colors(k: int) -> np.ndarray:
    """The colors of prototypes 0..k-1 in 0..1, (k 3). The color of a prototype suits any k."""
    i = np.arange(k)
    saturation, value = np.array([1.0, 0.7])[i % 2], np.array([0.9, 0.65, 0.45])[i % 3]
    colors = hsv_to_rgb(np.stack([i * GOLDEN % 1, saturation, value], axis=1))
    first = FIRST_COLORS[:k]
    colors[: len(first)] = [to_rgb(color) for color in first]
    return colors


def as_images(images: Tensor) -> np.ndarray:
    """images (b 3 y x) uint8 -> (b y x 3) in 0..1."""
    return rearrange(images, "b rgb y x -> b y x rgb").cpu().numpy() / 255


def pages(items: Sequence, file: Path) -> list[tuple[Path, Sequence]]:
    """The items, `PER_PAGE` to a file: FILE-001, FILE-002, ..., or FILE alone if they all fit."""
    parts = [items[i : i + PER_PAGE] for i in range(0, len(items), PER_PAGE)]
    if len(parts) == 1:
        return [(file, parts[0])]
    names = [file.with_stem(f"{file.stem}-{number:03d}") for number in range(1, len(parts) + 1)]
    return list(zip(names, parts))


Cell = tuple[str, np.ndarray] | None  # caption and image (y x 3) in 0..1


def grid(
    title: str, rows: Sequence[Sequence[Cell]], names: Sequence[str] = (), side: float = 1.5
) -> tuple[Figure, np.ndarray]:
    """A figure of images and its axes (row column). names: of the rows; side: of a cell, inches."""
    columns = max(4, *map(len, rows))  # a title needs the width of four
    width = side * columns + 0.1 * max(map(len, names), default=0)
    figure = Figure((width, 1.1 * side * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, cells in zip(axes, rows):
        for axis, cell in zip(row, cells):
            if cell:
                axis.set_title(cell[0], fontsize=8)
                axis.imshow(cell[1], interpolation="nearest")
    for row, name in zip(axes, names):
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    return figure, axes


@torch.no_grad()
def segment_of(network: GroupingNetwork, image: Tensor, prototype: int) -> Tensor:
    """The pixels of image (3 y x) uint8 that belong to a prototype, (y x) bool.

    A single cell of the map can lose all its pixels to its neighbors when the maps are enlarged.
    Then the cells themselves are returned, so that every retrieved segment is visible.
    """
    _, similarity = network(normalize(image[None].to(network.prototypes.weight.device)))
    similarity = similarity.cpu()
    mask = winner(similarity, image.shape[-2:])[0] == prototype
    if not mask.any():
        cells = (similarity.argmax(dim=1, keepdim=True) == prototype).float()  # over k
        mask = F.interpolate(cells, image.shape[-2:])[0, 0] > 0
    return mask


def draw_prototypes(
    file: Path,
    network: GroupingNetwork,
    images: Sequence[Tensor],
    view: Callable[[Tensor], Tensor],
    found: Retrieval,
    chosen: Sequence[int],
) -> list[Path]:
    """One column per prototype, the best segment on top, in red; several files if there are many.

    view: image (3 y x) -> square, the one that was retrieved with. Returns the files written.
    """
    files, colors, top = [], prototype_colors(len(found.active)), found.images.shape[1]
    title = f"The {top} best segments of each prototype, best on top, in red"
    for page, numbers in pages(chosen, file):
        figure, axes = grid(title, [[None] * len(numbers)] * top, side=1.3)
        for k, column in zip(numbers, axes.T):
            column[0].set_title(f"prototype {k}\nin {int(found.active[k])} images", fontsize=8)
            # The color that this prototype has in all other figures
            column[0].spines["top"].set(visible=True, color=colors[k], linewidth=4)
            for axis, index in zip(column, found.images[k].tolist()):
                if index >= 0:
                    image = view(images[index])
                    draw_retrieved(axis, image, segment_of(network, image, k).numpy())
        figure.savefig(page, dpi=120)
        files.append(page)
    return files


def draw_retrieved(axis: Axes, image: Tensor, mask: np.ndarray) -> None:
    """A segment of image (3 y x) uint8 in red within a white line, with an arrow if it is small, as
    on the slide. mask (y x) bool.
    """
    pixels = as_images(image[None])[0]
    red = 0.45 * pixels + 0.55 * np.array(RED)
    axis.imshow(np.where(mask[..., None], red, pixels), interpolation="nearest")
    if mask.any() and not mask.all():
        axis.contour(mask, levels=[0.5], colors="white", linewidths=0.7)
    if 0 < mask.mean() < 0.03:
        places, size = np.argwhere(mask), np.array(mask.shape)  # rows of (y, x)
        distances = np.square(places - places.mean(axis=0)).sum(axis=1)
        place = places[distances.argmin()]  # the pixel nearest to the middle
        tail = place + 0.3 * size * np.where(place < size / 2, 1, -1)
        arrow = dict(color="red", ec="white", width=2, headwidth=7, headlength=7)
        axis.annotate("", place[::-1], tail[::-1], arrowprops=arrow)


def draw_groups(
    file: Path, images: Tensor, groups: Tensor, target: Tensor, k: int, report: Mapping[str, Any]
) -> None:
    """Images, the groups found in them, and the truth, each class in the color of its prototype.

    images (b 3 y x) uint8; groups (b y x) in 0..k-1; target (b y x) in 0..t-1 or IGNORE; report: of
    the whole data set, with matching (class -> prototype) and iou (class -> IoU).
    """
    colors, matching = prototype_colors(k), report["matching"]
    of_class = np.full((IGNORE + 1, 3), GRAY)
    for t, prototype in enumerate(matching.values()):
        if prototype is not None:
            of_class[t] = colors[prototype]
    rows = dict(scene=as_images(images), groups=colors[groups.cpu().numpy()])
    rows["truth"] = of_class[target.cpu().numpy()]
    title = "Scenes never trained on, and the groups found in them without a label"
    figure, _ = grid(title, [[("", image) for image in row] for row in rows.values()], list(rows))
    entries = []
    for t, (name, prototype) in enumerate(matching.items()):
        owner = "no prototype" if prototype is None else f"prototype {prototype}"
        score = "" if report["iou"][name] is None else f", IoU {report['iou'][name]:.2f}"
        entries.append(Patch(facecolor=of_class[t], label=f"{name}: {owner}{score}"))
    others = [group for group in groups.unique().tolist() if group not in matching.values()]
    for group in others[:8]:
        entries.append(Patch(facecolor=colors[group], label=f"prototype {group}, no class"))
    text = "A class has the color of the prototype that is matched with it. Gray: no prototype."
    options = dict(ncols=4, fontsize=8.5, frameon=False, title=text)
    figure.legend(handles=entries, loc="outside lower center", **options)
    figure.savefig(file, dpi=130)


def save_comparison(
    file: Path,
    scenes: Tensor,
    semantic: Tensor,
    regions: Tensor,
    groups: Mapping[str, Tensor],
    title: str,
) -> None:
    """Rows are systems, columns the same scenes. One color is one group of a row: colors of two
    rows have nothing in common, and in rows of slots nothing from scene to scene.

    scenes (n 3 y x) uint8; semantic, regions (n y x): the truth; groups: name of the row ->
    (n y x).
    """
    rows = {"scene": as_images(scenes)}
    numbered = {"truth: classes": semantic, "truth: objects": regions, **groups}
    for name, numbers in numbered.items():
        rows[name] = prototype_colors(int(numbers.max()) + 1)[numbers.long().cpu().numpy()]
    cells = [[("", image) for image in row] for row in rows.values()]
    grid(title, cells, list(rows), side=1.15)[0].savefig(file, dpi=90)


def principal_colors(embeddings: Tensor, size: tuple[int, int]) -> Tensor:
    """embeddings (b d h w) -> their first three principal components as colors (b y x 3) in 0..1.

    The components are those of all images together, so that equal colors mean similar features
    across images. size: (y, x).
    """
    b, _, h, w = embeddings.shape
    rows = rearrange(embeddings, "b d h w -> (b h w) d")
    rows = F.normalize(rows, dim=1)  # over d: cosines are what the method compares
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    # The sign of a direction is arbitrary: the largest entry is made positive.
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    parts = F.pad(rows @ (signs * directions).T, (0, 3 - len(directions)))
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    parts = ((parts - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    maps = rearrange(parts, "(b h w) rgb -> b rgb h w", b=b, h=h, w=w)
    enlarged = F.interpolate(maps, size, mode="bicubic").clamp(0, 1)
    return rearrange(enlarged, "b rgb y x -> b y x rgb")


def tint(image: np.ndarray, color: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """A pale gray copy of image (y x 3) in 0..1, colored where `sure` (y x) in 0..1 is high."""
    pale = 0.6 + 0.4 * image.mean(axis=2, keepdims=True)  # over rgb; dark photographs stay light
    sure = sure[..., None]
    return (pale * (1 - sure) + (0.25 * pale + 0.75 * np.asarray(color)) * sure).clip(0, 1)


@torch.no_grad()
def draw_parts(
    file: Path, network: GroupingNetwork, images: Tensor, temperature: float, slots: int = 4
) -> list[Path]:
    """One row per image: it, its groups, its strongest slots, the PCA of its features.

    images (b 3 y x) uint8; temperature: of the soft assignment; slots: how many. Several files if
    there are many images, each with a PCA of its own. Returns the files written.
    """
    k, device, size = (
        network.prototypes.num_embeddings,
        network.prototypes.weight.device,
        images.shape[-2:],
    )
    colors, files = prototype_colors(k), []
    title = (
        "Colors mean prototypes, the same in every row. Slot: how much each place belongs to its "
        "prototype.\nFeatures: the first three principal components of the embeddings."
    )
    for page, some in pages(images, file):
        embeddings, similarity = (each.cpu() for each in network(normalize(some.to(device))))
        segments, soft = winner(similarity, size).numpy(), assignment(similarity, temperature)
        features = principal_colors(embeddings.float(), size).numpy()
        rows = []
        for image, groups, maps, feature in zip(as_images(some), segments, soft, features):
            cells = [("image", image), (f"{len(np.unique(groups))} groups", colors[groups])]
            enlarged = F.interpolate(maps[None], size, mode="bilinear")[0].numpy()
            mass = reduce(maps, "k h w -> k", "mean")
            for slot in mass.topk(min(slots, k)).indices.tolist():
                drawn = tint(image, colors[slot], enlarged[slot])
                cells.append((f"slot {slot}: {float(mass[slot]):.0%}", drawn))
            rows.append([*cells, ("features", feature)])
        grid(title, rows, side=1.7)[0].savefig(page, dpi=130)
        files.append(page)
    return files
