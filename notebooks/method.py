"""The diagram of the method: every box is a tensor of one step of the committed network, toy.pth.

    python notebooks/method.py        writes docs/images/method.png

`method.show("slots")`, at the top of a notebook, has the box of that name framed.
"""

import io
import os
import random
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from IPython import display
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path
from PIL import Image, ImageDraw

import course  # first: it finds the modules

import losses
import toy
from data import Batch, TwoCrops, draw_crop
from engine.options import chosen_for
from measures.datasets import UNSEEN
from measures.figures import principal_colors
from photometric import IMAGENET_MEAN, IMAGENET_STD, Photometric
from plots import CLASS_COLORS, as_image, few_colors
from slotcon import Report, SlotCon

FILE = course.ROOT / "docs" / "images" / "method.png"
WIDTH, HEIGHT = 13.0, 7.0  # inches
SEED = 55  # of the crops; the first scene of the batch is shown
BOXES = {  # name -> left, bottom, width, height, as shares of the figure
    "views": (0.005, 0.365, 0.275, 0.63),
    "student": (0.295, 0.69, 0.15, 0.305),
    "teacher": (0.295, 0.365, 0.15, 0.305),
    "similarity": (0.465, 0.365, 0.15, 0.63),
    "aligned": (0.635, 0.365, 0.15, 0.63),
    "group loss": (0.805, 0.52, 0.19, 0.325),
    "total loss": (0.805, 0.875, 0.19, 0.12),
    "average": (0.105, 0.005, 0.28, 0.335),
    "slots": (0.405, 0.005, 0.13, 0.335),
    "predictor": (0.55, 0.18, 0.07, 0.16),
    "slot loss": (0.635, 0.005, 0.15, 0.335),
    "center": (0.805, 0.005, 0.19, 0.335),
}
ARROWS = (  # x and y of the tail, of the head
    (0.28, 0.83, 0.295, 0.83), (0.28, 0.51, 0.295, 0.51), (0.445, 0.83, 0.465, 0.83),
    (0.445, 0.51, 0.465, 0.51), (0.615, 0.68, 0.635, 0.68), (0.785, 0.68, 0.805, 0.68),
    (0.505, 0.365, 0.505, 0.34), (0.535, 0.25, 0.55, 0.25), (0.62, 0.25, 0.635, 0.25),
    (0.535, 0.1, 0.635, 0.1), (0.90, 0.34, 0.90, 0.52), (0.90, 0.845, 0.90, 0.875),
)  # fmt: skip
PATHS = (  # corners; two paths have a gap where another arrow crosses them
    (((0.785, 0.2), (0.795, 0.2), (0.795, 0.66)), "-"),  # slot loss -> total loss
    (((0.795, 0.7), (0.795, 0.93), (0.805, 0.93)), "-|>"),
    (((0.445, 0.76), (0.455, 0.76), (0.455, 0.535)), "-"),  # embeddings of both -> slots
    (((0.455, 0.485), (0.455, 0.34)), "-|>"),
    (((0.445, 0.42), (0.455, 0.42)), "-"),
)
UPDATES = (  # corners of the paths that a step takes after its loss
    ((0.295, 0.72), (0.2875, 0.72), (0.2875, 0.34)),  # student -> average
    ((0.37, 0.34), (0.37, 0.365)),  # average -> teacher
    ((0.58, 0.365), (0.58, 0.353), (0.85, 0.353), (0.85, 0.335)),  # teacher's similarity -> center
)


def step() -> tuple[torch.Tensor, Batch, torch.Tensor, Report]:
    """Scenes (b 3 y x), their crops, the crops recolored (b v 3 y x), what a forward finds."""
    model, config, _ = course.trained()
    scenes, rng = toy.ToyImages(UNSEEN, 16).images, random.Random(SEED)
    crops = TwoCrops(**chosen_for(TwoCrops, config))
    batch = Batch(*map(torch.stack, zip(*(crops(scene, rng) for scene in scenes))))
    recolor = Photometric(**chosen_for(Photometric, config))
    views = recolor(batch.views, torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        return scenes, batch, views, model(views, batch.boxes, batch.flipped)[1]


def panel(place: tuple[float, float], size: tuple[float, float], image: Any, text: str, **more):
    """An image at a place (shares of the figure), size in inches, a text below it."""
    axis = plt.gcf().add_axes((*place, size[0] / WIDTH, size[1] / HEIGHT))
    axis.imshow(as_image(image), interpolation="nearest", aspect="auto", **more)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(text, fontsize=10, labelpad=2)
    return axis


def four_maps(similarity: torch.Tensor, order: list[int], colors: np.ndarray) -> np.ndarray:
    """similarity (k h w) -> those of four prototypes (2h 2w 3): white is 0, its color is 1."""
    strong = similarity[order].clamp(0, 1)[..., None].numpy()
    tinted = 1 - strong * (1 - colors[order][:, None, None])
    tinted = np.repeat(np.repeat(tinted, 8, 1), 8, 2)
    tinted[:, :1], tinted[:, :, :1] = 0.5, 0.5  # lines between the maps
    return rearrange(tinted, "(row column) h w rgb -> (row h) (column w) rgb", row=2)


def slot_rows(slots: torch.Tensor, owned: list[int], colors: np.ndarray) -> np.ndarray:
    """slots (k d) -> rows of the owned ones, the prototype's color first, then blue to red."""
    rows = plt.get_cmap("coolwarm")(slots[owned].numpy() / 8 + 0.5)[..., :3]
    return np.concatenate([np.repeat(colors[owned][:, None], 4, 1), rows], axis=1)


def frame() -> None:
    """Boxes, their names, arrows, the legend."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT), layout="tight")
    figure.set_layout_engine("none")
    for name, (left, bottom, width, height) in BOXES.items():
        style = dict(fc="#f6f6f6", ec="#b0b0b0", zorder=-1)
        figure.add_artist(Rectangle((left, bottom), width, height, **style))
        figure.text(left + 0.006, bottom + height - 0.01, name, va="top", weight="bold")
    for *tail, x, y in ARROWS:
        style = dict(arrowstyle="-|>", mutation_scale=20, lw=2, color="black")
        figure.add_artist(FancyArrowPatch(tail, (x, y), **style))
    style = dict(arrowstyle="-|>", mutation_scale=12, lw=1.5)
    for corners, head in PATHS:
        drawn = style | dict(arrowstyle=head, color="black")
        figure.add_artist(FancyArrowPatch(path=Path(corners), **drawn))
    for corners in UPDATES:
        dashed = dict(color="dimgray", ls=(0, (4, 2)), **style)
        figure.add_artist(FancyArrowPatch(path=Path(corners), **dashed))
    words = "(dashed: after each step; solid: forward)"
    figure.text(0.168, 0.329, words, va="top", fontsize=9)
    patches = [Rectangle((0, 0), 1, 1, color=color / 255) for color in CLASS_COLORS]
    where = dict(loc="lower left", bbox_to_anchor=(0, 0.0), handlelength=1, frameon=False)
    title = "prototypes\nmatched with"
    figure.legend(patches, toy.CLASS_NAMES, fontsize=10, title=title, title_fontsize=10, **where)


def draw() -> None:
    """The diagram, as the current figure."""
    model, config, colors = course.trained()
    scenes, _, views, report = step()
    s1, t2 = report.student[0], report.teacher[1]
    frame()
    square, rng = (1.55, 1.55), random.Random(SEED)
    first = draw_crop(64, 64, rng, config.min_area)
    second = draw_crop(64, 64, rng, config.min_area, first)
    axis = panel((0.014, 0.565), square, scenes[0], "a scene, crops 1 and 2")
    named = zip((first, second), ("white", "black"), ("black", "white"), "12")
    for (top, left, height, width), color, other, name in named:
        axis.add_patch(Rectangle((left, top), width - 1, height - 1, fill=False, ec=color, lw=3))
        place = dict(va="bottom", color=other, fontsize=9, weight="bold")
        box = dict(facecolor=color, lw=0, pad=1.5)
        axis.text(left, top + height - 1, name, bbox=box, **place)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    most = s1.similarity[0].argmax(0).flatten().bincount(minlength=len(colors))  # over k
    order = most.argsort(descending=True)[:4].tolist()
    both = torch.stack([s1.embeddings[0], t2.embeddings[0]])
    embedded = principal_colors(both, both.shape[-2:])
    for v, (y, record) in enumerate(((0.735, s1), (0.41, t2))):
        panel((0.152, y), square, (views[0, v] * std + mean).clamp(0, 1), f"view {v + 1}")
        panel((0.311, y), square, embedded[v], "embeddings, PCA")
        maps = four_maps(record.similarity[0], order, colors)
        panel((0.481, y), square, maps, "4 prototypes of k")
        panel((0.651, y), square, colors[record.aligned[0].argmax(0)], "nearest prototype")
    target = ((t2.aligned[0] - model.center[:, None, None]) / model.temp_teacher).softmax(0)
    cost = -(target * (s1.aligned[0] / model.temp_student).log_softmax(0)).sum(0)  # over k
    panel((0.84, 0.57), square, cost, "cross-entropy of each cell", cmap="magma", vmin=0)
    total, group, slot = report.losses.tolist()
    share = model.group_weight
    plt.gcf().text(0.811, 0.948, "\u03bb group loss + (1 \u2212 \u03bb) slot loss", va="top")
    numbers = f"{share} \u00b7 {group:.2f} + {1 - share} \u00b7 {slot:.2f} = {total:.2f}"
    plt.gcf().text(0.811, 0.914, numbers, va="top")
    draw_lower_row(model, report, colors)


def draw_lower_row(model: SlotCon, report: Report, colors: np.ndarray) -> None:
    """Average, slots, slot loss and center."""
    s1, t2, pairs, k = report.student[0], report.teacher[1], report.pairs[0], len(colors)
    owned = (s1.occupied[0] & t2.occupied[0]).nonzero().flatten().tolist()
    with torch.no_grad():
        predicted = model.predictor(s1.slots[0])
    for place, width, rows, name in (
        ((0.415, 0.19), 1.43, s1.slots[0], "student's"),
        ((0.558, 0.19), 0.7, predicted, ""),
        ((0.415, 0.045), 1.43, t2.slots[0], "teacher's"),
    ):
        panel(place, (width, 0.75), slot_rows(rows, owned, colors), name)
    networks = (0.116, model.student, "student's prototypes"), (0.252, model.teacher, "teacher's")
    for x, network, name in networks:
        rows = slot_rows(network.prototypes.weight.detach(), list(range(k)), colors)
        panel((x, 0.05), (1.6, 1.55), rows, name)
    with torch.no_grad():
        queries, keys = losses.unit_rows(s1.slots, t2.slots, model.predictor, pairs)
    n, m = int((pairs.queries < 4 * k).sum()), int((pairs.keys < 4 * k).sum())
    cosines = (queries @ keys.T)[:n, :m]
    axis = panel((0.656, 0.05), (1.55, 1.55), cosines, "teacher's slots, 4 scenes", vmin=-1, vmax=1)
    axis.set_ylabel("predicted, student's", fontsize=9, labelpad=2)
    axis = plt.gcf().add_axes((0.845, 0.06, 0.14, 0.21))
    axis.bar(range(k), model.center.numpy(), color=colors)
    axis.set_xlabel("mean similarity of each k", fontsize=10, labelpad=2)
    axis.tick_params(labelsize=9)


def write(file: os.PathLike = FILE) -> None:
    """Save the diagram."""
    draw()
    drawn = io.BytesIO()
    plt.savefig(drawn, dpi=100)
    plt.close()
    few_colors(Image.open(drawn), refine=1).save(file, optimize=True)
    print(f"figure: {file}")


def show(box: str) -> None:
    """Show the committed diagram with one box framed. Raises KeyError for another name."""
    with Image.open(FILE) as file:
        picture = file.convert("RGB")
    left, bottom, width, height = BOXES[box]
    corners = left, 1 - bottom - height, left + width, 1 - bottom
    scaled = [share * side for share, side in zip(corners, 2 * picture.size)]
    ImageDraw.Draw(picture).rounded_rectangle(scaled, 12, outline=(220, 30, 30), width=6)
    framed = io.BytesIO()
    few_colors(picture).save(framed, format="png", optimize=True)
    words = display.Markdown("*One step of SlotCon; every image is a tensor of it. Red: here.*")
    display.display(display.Image(framed.getvalue(), format="png", width=900), words)


if __name__ == "__main__":
    write()
