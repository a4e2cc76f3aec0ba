"""Figures of what was learned: segments of prototypes, groups, soft assignments, features.

Slide: "Understanding the semantic grouping ability: nearest neighbor visualization" (figure 3).
Paper: section 4.
Differs: the figures of groups and of their parts are ours [U]. A prototype has the same color in
all figures (palette.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # draws into files, without a window
from matplotlib.patches import Patch
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from grouping import GroupingNetwork, assignment
from measures import metrics
from measures.palette import GRAY, prototype_colors
from measures.retrieval import Retrieval
from measures.segments import winner
from photometric import normalize

RED = (255, 40, 30)  # of a retrieved segment, as on the slide
PER_PAGE = 12  # columns of prototypes, rows of images


def pages(items: Sequence, file: Path) -> list[tuple[Path, Sequence]]:
    """The items, `PER_PAGE` to a file: FILE-001, FILE-002, ..., or FILE alone if they all fit."""
    parts = [items[i : i + PER_PAGE] for i in range(0, len(items), PER_PAGE)]
    if len(parts) == 1:
        return [(file, parts[0])]
    return [(file.with_stem(f"{file.stem}-{number:03d}"), part)
            for number, part in enumerate(parts, start=1)]


# ------------------------------------------------------------------------------------- prototypes


@torch.no_grad()
def segment_of(network: GroupingNetwork, image: Tensor, prototype: int) -> Tensor:
    """The pixels of image (3 y x) uint8 that belong to a prototype, (y x) bool.

    A single cell of the feature grid can lose all its pixels to its neighbors when the maps are
    enlarged. Then the cells themselves are returned, so that every retrieved segment is visible.
    """
    _, similarity = network(normalize(image[None].to(network.prototypes.weight.device)))
    similarity = similarity.cpu()
    mask = winner(similarity, image.shape[-2:])[0] == prototype
    if not mask.any():
        cells = (similarity.argmax(dim=1, keepdim=True) == prototype).float()  # over k
        mask = F.interpolate(cells, image.shape[-2:])[0, 0] > 0
    return mask


def redden(image: Tensor, mask: Tensor) -> Tensor:
    """image (3 y x) uint8 with the pixels of mask (y x) bool in red, as on the slide."""
    return draw_segmentation_masks(image, mask, alpha=0.55, colors=RED)


def draw_retrieved(axis: Axes, image: Tensor, mask: Tensor) -> None:
    """A retrieved segment in red within a white line, with an arrow if it is small (slide)."""
    red = rearrange(redden(image, mask), "rgb y x -> y x rgb").numpy()
    axis.imshow(red, interpolation="nearest")
    if mask.any() and not mask.all():
        axis.contour(mask.numpy(), levels=[0.5], colors="white", linewidths=0.7)
    if 0 < mask.float().mean() < 0.03:
        places = mask.nonzero().float()  # rows of (y, x)
        distances = (places - places.mean(dim=0)).square().sum(dim=1)
        y, x = places[distances.argmin()].tolist()  # the pixel nearest to the middle
        height, width = mask.shape
        tail = (x + math.copysign(0.3 * width, width / 2 - x),
                y + math.copysign(0.3 * height, height / 2 - y))
        for color, size in (("white", 3.2), ("red", 1.6)):
            arrow = dict(color=color, width=size, headwidth=size + 5, headlength=size + 5)
            axis.annotate("", (x, y), tail, arrowprops=arrow)


def draw_prototypes(
    file: Path, network: GroupingNetwork, images: Sequence[Tensor],
    view: Callable[[Tensor], Tensor] | None, found: Retrieval, chosen: list[int],
) -> list[Path]:  # fmt: skip
    """One column per prototype, the best segment on top; several files if there are many.

    view: image (3 y x) -> square, the one that was retrieved with. Returns the files written.
    """
    colors, files = prototype_colors(len(found.active)) / 255, []
    top = found.images.shape[1]
    for page, numbers in pages(chosen, file):
        columns = max(len(numbers), 4)
        figure = Figure((1.3 * columns, 1.3 * top + 0.9), layout="constrained")
        figure.suptitle(f"The {top} best segments of each prototype, best on top, in red",
                        fontsize=11)
        axes = figure.subplots(top, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for column, k in zip(axes.T, numbers):
            column[0].set_title(f"prototype {k}\nin {int(found.active[k])} images", fontsize=8)
            for axis, index in zip(column, found.images[k].tolist()):
                if index >= 0:
                    image = view(images[index])
                    draw_retrieved(axis, image, segment_of(network, image, k))
            # A bar in the color that this prototype has in all other figures.
            column[0].plot([0, 1], [1.03, 1.03], color=colors[k], lw=4,
                           transform=column[0].transAxes, clip_on=False)
        figure.savefig(page, dpi=120)
        files.append(page)
    return files


# ----------------------------------------------------------------------------------------- groups


def paint(segments: Tensor, num_prototypes: int) -> np.ndarray:
    """segments (... y x) in 0..k-1 -> (... y x 3) uint8 in the colors of their prototypes."""
    return prototype_colors(num_prototypes)[segments.numpy()]


def draw_groups(
    file: Path, images: Tensor, groups: Tensor, target: Tensor, num_prototypes: int,
    class_names: Sequence[str], matching: dict[str, int | None] | None = None,
    iou: dict[str, float | None] | None = None,
) -> None:  # fmt: skip
    """Images, the groups found in them, and the truth, each class in the color of its prototype.

    images (b 3 y x) uint8, at most 8; groups (b y x) in 0..k-1; target (b y x) in 0..t-1 or IGNORE;
    matching (class -> prototype) and iou (class -> IoU) as in the report on the whole data set;
    without a matching, these images are matched.
    """
    images, groups, target = images[:8].cpu(), groups[:8].cpu(), target[:8].cpu().long()
    if matching is None:
        table = metrics.confusion_matrix(groups, target, num_prototypes, len(class_names))
        classes = metrics.match(table).tolist()
        matching = {name: classes.index(t) if t in classes else None
                    for t, name in enumerate(class_names)}
    of_class = np.full((metrics.IGNORE + 1, 3), GRAY, dtype=np.uint8)
    for t, name in enumerate(class_names):
        if matching.get(name) is not None:
            of_class[t] = prototype_colors(num_prototypes)[matching[name]]

    b = len(images)
    figure = Figure((1.45 * max(b, 4) + 0.6, 6.2), layout="constrained")
    figure.suptitle("Scenes never trained on, and the groups found in them without a label",
                    fontsize=13)
    rows = {"scene": rearrange(images, "b rgb y x -> b y x rgb").numpy(),
            "groups found": paint(groups, num_prototypes), "truth": of_class[target.numpy()]}
    for axes, (name, drawn) in zip(figure.subplots(3, b, squeeze=False), rows.items()):
        for axis, image in zip(axes, drawn):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(name, fontsize=11)
    entries = groups_legend(groups, num_prototypes, class_names, matching, iou or {})
    legend = figure.legend(
        handles=entries, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False,
        title="One color is one prototype, in every scene. In the truth, a class has the color of "
              "the prototype that is matched with it:\nwhere the two lower rows agree, the "
              "prototype has found the class.")
    legend.get_title().set_multialignment("center")
    figure.savefig(file, dpi=130)


def groups_legend(
    groups: Tensor, num_prototypes: int, class_names: Sequence[str],
    matching: dict[str, int | None], iou: dict[str, float | None],
) -> list[Patch]:  # fmt: skip
    """A patch per class with its prototype, then up to 8 for prototypes in use without a class."""
    colors, entries = prototype_colors(num_prototypes) / 255, []
    for name in class_names:
        prototype = matching.get(name)
        owner = "no prototype" if prototype is None else f"prototype {prototype}"
        score = "" if iou.get(name) is None else f", IoU {iou[name]:.2f}"
        color = np.array(GRAY) / 255 if prototype is None else colors[prototype]
        entries.append(Patch(facecolor=color, label=f"{name}: {owner}{score}"))
    others = [k for k in groups.unique().tolist() if k not in matching.values()]
    return entries + [Patch(facecolor=colors[k], label=f"prototype {k}, no class of its own")
                      for k in others[:8]]


# ------------------------------------------------------------------------------------------ parts


def strongest(soft: Tensor, count: int) -> list[int]:
    """The prototypes with the most assignment in an image, soft (k h w), the strongest first."""
    mass = reduce(soft, "k h w -> k", "sum")
    return mass.topk(min(count, len(soft))).indices.tolist()


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
    return (pale * (1 - sure) + (0.25 * pale + 0.75 * color) * sure).clip(0, 1)


@torch.no_grad()
def draw_parts(
    file: Path, network: GroupingNetwork, images: Tensor, temperature: float, slots: int = 4
) -> list[Path]:
    """One row per image: it, its groups, its strongest slots, the PCA of its features.

    images (b 3 y x) uint8; temperature: of the soft assignment; slots: how many. Several files if
    there are many images, each with a PCA of its own. Returns the files written.
    """
    k, device = network.prototypes.num_embeddings, network.prototypes.weight.device
    slots, colors, size, files = min(slots, k), prototype_colors(k) / 255, images.shape[-2:], []
    for page, some in pages(images, file):
        embeddings, similarity = (each.cpu() for each in network(normalize(some.to(device))))
        segments, soft = winner(similarity, size), assignment(similarity, temperature)
        features = principal_colors(embeddings.float(), size)
        figure = Figure((1.7 * (3 + slots), 1.95 * len(some) + 0.9), layout="constrained")
        figure.suptitle("Colors mean prototypes, the same in every row. Slot: how much each place "
                        "belongs to its prototype.\nFeatures: the first three principal components "
                        "of the embeddings; similar colors, similar features.", fontsize=9)
        axes = figure.subplots(len(some), 3 + slots, squeeze=False)
        for row, image in enumerate(rearrange(some, "b rgb y x -> b y x rgb").numpy() / 255):
            groups = f"{len(segments[row].unique())} groups"
            shown = [("image", image), (groups, colors[segments[row].numpy()])]
            enlarged = F.interpolate(soft[row : row + 1], size, mode="bilinear")[0].numpy()
            for slot in strongest(soft[row], slots):
                title = f"slot {slot}: {float(soft[row, slot].mean()):.0%}"
                shown.append((title, tint(image, colors[slot], enlarged[slot])))
            shown.append(("features", features[row].numpy()))
            for axis, (title, drawn) in zip(axes[row], shown):
                axis.imshow(drawn, interpolation="nearest")
                axis.set_title(title, fontsize=8)
                axis.axis("off")
        figure.savefig(page, dpi=130)
        files.append(page)
    return files
