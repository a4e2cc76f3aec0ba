"""Figures of what was learned: segments of prototypes, groups, soft assignments, features."""

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
from matplotlib.text import Text
from torch import Tensor

from engine.files import write_atomically
from grouping import GroupingNetwork, assignment
from measures import metrics
from measures.groups import winner
from measures.metrics import IGNORE
from measures.retrieval import Retrieval
from photometric import normalize

# Okabe and Ito (2008), then colors far from all before them, up to the 13th with every kind of
# color vision; none is near gray, black or white
FIRST_COLORS = """
    #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7 #870f69 #a50fff #3c0fd2 #00f0c3 #8778f0
    #a51e00 #ff00e1 #006900 #00d200 #ffa5ff #e10069 #2d5aff #784bb4 #c300b4 #969600 #ff8778 #d269ff
""".split()
GRAY = (0.63, 0.63, 0.63)  # what has no label
PER_PAGE = 12  # columns of prototypes, rows of images


def prototype_colors(k: int, use: Tensor | None = None) -> np.ndarray:
    """The colors of prototypes 0..k-1 in 0..1, (k 3), the best separated ones first.

    use (k): how much each is used; the most used ones get the first colors.
    """
    random = np.random.default_rng(0)  # hue, saturation, value; prototype by prototype
    colors = hsv_to_rgb(random.uniform((0, 0.6, 0.5), (1, 1, 0.9), (k, 3)))
    first = FIRST_COLORS[:k]
    colors[: len(first)] = [to_rgb(color) for color in first]
    if use is not None:
        colors[use.argsort(descending=True, stable=True).cpu()] = colors.copy()
    return colors


def matched_colors(matched: Sequence[int | None], use: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Colors of classes 0..t-1, (t 3), and of prototypes 0..k-1, (k 3): that of a class and of the
    prototype that is matched with it are one. matched: by class; use (k) as above.
    """
    t, use = len(matched), use.double().clone()
    owned = [k for k in matched if k is not None]
    use[owned] = -1  # they need no color of their own
    colors = prototype_colors(t + len(use), F.pad(use, (t, 0), value=torch.inf))
    colors[[t + k for k in owned]] = colors[[i for i in range(t) if matched[i] is not None]]
    return colors[:t], colors[t:]


def as_images(images: Tensor) -> np.ndarray:
    """images (b 3 y x) uint8 -> (b y x 3) in 0..1."""
    return rearrange(images, "b rgb y x -> b y x rgb").cpu().numpy() / 255


def pages(items: Sequence, file: Path) -> list[tuple[Path, Sequence]]:
    """The items, `PER_PAGE` to a file: FILE-001, FILE-002, ..., or FILE alone if they all fit."""
    parts = [items[i : i + PER_PAGE] for i in range(0, len(items), PER_PAGE)]
    names = [file.with_stem(f"{file.stem}-{number:03d}") for number in range(1, len(parts) + 1)]
    return [(file, items)] if len(parts) == 1 else list(zip(names, parts))


def save(figure: Figure, file: Path, dpi: int) -> None:
    """Write a figure; a "$" in a name begins no formula. Raises OSError that names the file."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    form = file.suffix[1:].lower()
    write_atomically(file, lambda out: figure.savefig(out, dpi=dpi, format=form))


Cell = np.ndarray | tuple[str, np.ndarray] | None  # image (y x 3) in 0..1, below a caption


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
            if cell is not None:
                caption, image = cell if isinstance(cell, tuple) else ("", cell)
                axis.set_title(caption, fontsize=8)
                axis.imshow(image, interpolation="nearest")
    for row, name in zip(axes, names):
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    return figure, axes


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
) -> list[Path]:  # fmt: skip
    """One column per prototype, the best segment on top -> the files, one per page."""
    colors, top = prototype_colors(len(found.cells), found.cells), found.images.shape[1]
    title = (
        f"The {top} best segments of each prototype, best on top, in a line of its color.\n"
        "All else in an image is gray. An arrow points at a small segment."
    )
    files = []
    for page, numbers in pages(chosen, file):
        figure, axes = grid(title, [[None] * len(numbers)] * top, side=1.3)
        for k, column in zip(numbers, axes.T):
            column[0].set_title(f"prototype {k}\nin {int(found.active[k])} images", fontsize=8)
            for axis, index in zip(column, found.images[k].tolist()):
                if index >= 0:
                    image = view(images[index])
                    draw_retrieved(axis, image, segment_of(network, image, k), colors[k])
        save(figure, page, 120)
        files.append(page)
    return files


def draw_retrieved(axis: Axes, image: Tensor, segment: Tensor, color: np.ndarray) -> None:
    """A segment (y x) bool of image (3 y x) uint8 in a line, all else gray; an arrow if small."""
    mask, size = segment.numpy(), np.array(segment.shape)
    picture = as_images(image[None])[0]
    # A little of the color, since what is inside can be white or gray itself
    inside = 0.8 * picture + 0.2 * color
    axis.imshow(np.where(mask[..., None], inside, pale(picture)), interpolation="nearest")
    if mask.any() and not mask.all():
        axis.contour(mask, levels=[0.5], colors=[color], linewidths=1.2)
    if 0 < mask.mean() < 0.03:
        places = np.argwhere(mask)  # rows of (y, x)
        place = places[np.square(places - places.mean(axis=0)).sum(axis=1).argmin()]
        tail = place + 0.3 * size * np.where(place < size / 2, 1, -1)
        arrow = dict(color="black", ec="white", width=2, headwidth=7, headlength=7)
        axis.annotate("", place[::-1], tail[::-1], arrowprops=arrow)


def draw_groups(
    file: Path, images: Tensor, groups: Tensor, target: Tensor, k: int, report: Mapping[str, Any]
) -> None:
    """Images (b 3 y x) uint8, groups (b y x), truth (b y x); report: of `groups.compare`."""
    matching = report["matching"]
    use = groups.flatten().bincount(minlength=k)
    classes, colors = matched_colors(list(matching.values()), use)
    of_class = np.vstack([classes, np.full((IGNORE + 1 - len(classes), 3), GRAY)])
    rows = dict(scene=as_images(images), groups=colors[groups], truth=of_class[target])
    title = "Scenes never trained on, and the groups found in them without a label"
    figure, _ = grid(title, list(rows.values()), list(rows))
    entries = []
    for color, (name, prototype) in zip(classes, matching.items()):
        owner = "no prototype" if prototype is None else f"prototype {prototype}"
        score = "" if report["iou"][name] is None else f", IoU {report['iou'][name]:.2f}"
        entries.append(Patch(facecolor=color, label=f"{name}: {owner}{score}"))
    text = "A class and the prototype that is matched with it have one color."
    figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False, title=text)
    save(figure, file, 130)


def save_comparison(
    file: Path, scenes: Tensor, semantic: Tensor, regions: Tensor,
    groups: Mapping[str, tuple[Tensor, bool]], title: str,
) -> None:  # fmt: skip
    """Columns: scenes (n 3 y x) uint8; rows: truth and groups (n y x).

    groups: row -> groups, and whether they are of one image each. A group has the color of the
    class that it is matched with, one to one; of one image each: of the region. Gray: of none.
    """
    rows = {"scene": as_images(scenes)}
    for name, truth in {"truth: classes": semantic, "truth: objects": regions}.items():
        rows[name] = prototype_colors(int(truth.max()) + 1)[truth.long().numpy()]
    for name, (found, alone) in groups.items():
        if alone:
            rows[name] = np.concatenate(
                [color_groups(*pair) for pair in zip(found.split(1), regions.split(1))]
            )
        else:
            rows[name] = color_groups(found, semantic)
    save(grid(title, list(rows.values()), list(rows), side=0.8)[0], file, 90)


def color_groups(groups: Tensor, truth: Tensor) -> np.ndarray:
    """groups, truth (n y x) -> the color of what each group is matched with (n y x 3)."""
    sizes = int(groups.max()) + 1, int(truth.max()) + 1
    classes = metrics.match(metrics.confusion_matrix(groups, truth, *sizes))
    colors = np.vstack([prototype_colors(sizes[1]), GRAY])  # the last one: `UNMATCHED`
    return colors[classes[groups.long()].numpy()]


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
) -> list[Path]:  # fmt: skip
    """A row per image (b 3 y x) uint8: groups, soft slots, features -> the files, one per page.

    use (k): for `prototype_colors`; by default, the pixels in these images.
    """
    k, size, files = network.prototypes.num_embeddings, images.shape[-2:], []
    parts = []
    for some in images.split(PER_PAGE):
        some = normalize(some.to(network.prototypes.weight.device))
        embeddings, similarity = (each.cpu() for each in network(some))
        features = principal_colors(embeddings.float(), size).numpy()
        parts.append((winner(similarity, size), assignment(similarity, temperature), features))
    pixels = torch.cat([segments.flatten() for segments, _, _ in parts]).bincount(minlength=k)
    colors = prototype_colors(k, pixels if use is None else use)
    title = "A color is one prototype. Slot: how much a place belongs to it. Features: PCA."
    for (page, some), part in zip(pages(images, file), parts):
        rows = []
        for image, groups, maps, feature in zip(as_images(some), *part):
            cells = [("image", image), (f"{len(groups.unique())} groups", colors[groups])]
            enlarged = F.interpolate(maps[None], size, mode="bilinear")[0].numpy()
            mass = reduce(maps, "k h w -> k", "mean")
            for slot in mass.topk(min(slots, k)).indices.tolist():
                drawn = tint(image, colors[slot], enlarged[slot])
                cells.append((f"slot {slot}: {float(mass[slot]):.0%}", drawn))
            rows.append([*cells, ("features", feature)])
        save(grid(title, rows, side=1.7)[0], page, 130)
        files.append(page)
    return files
