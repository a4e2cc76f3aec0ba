"""Look at what a checkpoint learned: its prototypes, the groups of a picture, the course of training.

    python visualize.py prototypes last.pth --data-dir COCO/val2017     figure 3: the best segments of each prototype
    python visualize.py groups last.pth photo1.jpg photo2.jpg           groups, soft assignments, PCA of the features
    python visualize.py training runs/toy                               the curves, and what healthy ones look like

Slides: "Understanding the semantic grouping ability: nearest neighbor visualization"; "Statistics about the slots".
Differs: the released script also ranks pictures in which a prototype owns no pixel (segments.py); the other pictures
are ours [U]. Prototype i has the same colour in all of them (palette.py).
Read next: the notebooks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure  # draws to files, with no window and no global state
from matplotlib.patches import Patch
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from engine import options, processes
from engine.images import BadImage, ImageFiles
from engine.weights import load_network
from grouping import GroupingNetwork, assignment
from measures import metrics
from measures.palette import GREY, palette
from measures.segments import Retrieval, centre_view, open_pictures, picture_size, stream, winner
from photometric import normalize

RED = (255, 40, 30)  # of a retrieved segment, as on the slide
BLUE, ORANGE = "#0072B2", "#D55E00"
COLUMNS_PER_PAGE = 12

# ------------------------------------------------------------------------------------- prototypes


@torch.no_grad()
def retrieve(network: GroupingNetwork, pictures: Sequence, view, top: int, batch_size: int, workers: int) -> Retrieval:
    """The best segments of every prototype among the pictures; view: image (3 y x) -> square."""
    device = network.prototypes.weight.device
    found = Retrieval(network.prototypes.num_embeddings, top)
    for indices, images in stream(pictures, view, batch_size, workers, "prototypes"):
        found.add(indices, network(normalize(images.to(device)))[1])
    return found


def choose_prototypes(active: Tensor, show: Sequence[str], count: int) -> list[int]:
    """Which prototypes to draw. active (k): in how many pictures each is occupied.

    show: ["used"], the `count` most active; ["extremes"], the five most and the five least active; ["all"], every one
    that is active anywhere; or numbers. Raises ValueError for anything else.
    """
    order = [int(k) for k in active.argsort(descending=True, stable=True) if active[k] > 0]
    extremes = order if len(order) <= 10 else order[:5] + order[-5:]
    named = {"used": order[:count], "extremes": extremes, "all": sorted(order)}
    if len(show) == 1 and show[0] in named:
        return named[show[0]]
    if not all(each.isdigit() and int(each) < len(active) for each in show):
        raise ValueError(f"--show {' '.join(show)}: used, extremes, all, or numbers from 0 to {len(active) - 1}")
    return [int(each) for each in show]


@torch.no_grad()
def segment_of(network: GroupingNetwork, image: Tensor, prototype: int) -> Tensor:
    """The pixels of image (3 y x) uint8 that belong to a prototype, (y x) bool.

    A single cell of the feature grid can lose all its pixels to its neighbours when the maps are enlarged; then the
    cells themselves are shown, so that whatever was retrieved can be seen.
    """
    similarity = network(normalize(image[None].to(network.prototypes.weight.device)))[1].cpu()
    mask = winner(similarity, image.shape[-2:])[0] == prototype
    if not mask.any():
        cells = (similarity.argmax(dim=1, keepdim=True) == prototype).float()  # over k
        mask = F.interpolate(cells, image.shape[-2:])[0, 0] > 0
    return mask


def redden(image: Tensor, mask: Tensor) -> Tensor:
    """image (3 y x) uint8 with the pixels of mask (y x) bool drawn reddish, as on the slide."""
    return draw_segmentation_masks(image, mask, alpha=0.55, colors=RED)


def draw_retrieved(axis, image: Tensor, mask: Tensor) -> None:
    """A retrieved segment in red within a white line, with an arrow if it is small, as on the slide."""
    axis.imshow(rearrange(redden(image, mask), "c y x -> y x c").numpy(), interpolation="nearest")
    if mask.any() and not mask.all():
        axis.contour(mask.numpy(), levels=[0.5], colors="white", linewidths=0.7)
    if 0 < mask.float().mean() < 0.03:
        places = mask.nonzero().float()  # rows of (y, x)
        y, x = places[(places - places.mean(dim=0)).square().sum(dim=1).argmin()].tolist()  # the middle one
        height, width = mask.shape
        tail = (x + math.copysign(0.3 * width, width / 2 - x), y + math.copysign(0.3 * height, height / 2 - y))
        for color, size in (("white", 3.2), ("red", 1.6)):
            arrow = dict(color=color, width=size, headwidth=size + 5, headlength=size + 5)
            axis.annotate("", (x, y), tail, arrowprops=arrow)


def save_prototypes(
    file: Path, network: GroupingNetwork, pictures: Sequence, view, found: Retrieval, chosen: list[int]
) -> list[Path]:
    """One column per prototype, best segment on top, several files if there are many. Returns the files written."""
    colors, files = palette(len(found.active)) / 255, []
    pages = [chosen[i : i + COLUMNS_PER_PAGE] for i in range(0, len(chosen), COLUMNS_PER_PAGE)]
    for number, page in enumerate(pages, start=1):
        top = found.pictures.shape[1]
        figure = Figure((1.3 * max(len(page), 4), 1.3 * top + 0.9), layout="constrained")
        figure.suptitle(f"The {top} best segments of each prototype, best on top, in red", fontsize=11)
        axes = figure.subplots(top, max(len(page), 4), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for column, k in enumerate(page):
            axes[0, column].set_title(f"prototype {k}\nin {int(found.active[k])} pictures", fontsize=8)
            for row, index in enumerate(found.pictures[k].tolist()):
                if index < 0:
                    continue
                image = view(pictures[index])
                draw_retrieved(axes[row, column], image, segment_of(network, image, k))
            axes[0, column].plot([0, 1], [1.03, 1.03], color=colors[k], lw=4, transform=axes[0, column].transAxes,
                                 clip_on=False)  # the colour that this prototype has in every other picture
        files.append(file if len(pages) == 1 else file.with_stem(f"{file.stem}-{number:03d}"))
        figure.savefig(files[-1], dpi=120)
    return files


def prototypes(args: argparse.Namespace) -> dict:
    network, config = load_network(args.checkpoint, args.which, args.device)
    dataset = "folder" if args.data_dir else "toy"
    pictures = open_pictures(dataset, args.data_dir, args.limit)
    view = centre_view(args.size or picture_size(dataset, config))
    found = retrieve(network, pictures, view, args.top, args.batch_size, args.workers)
    chosen = choose_prototypes(found.active, args.show, args.count)
    if not chosen:
        raise ValueError("no prototype is occupied in any picture")
    files = save_prototypes(Path(args.output), network, pictures, view, found, chosen)
    return dict(files=[str(file) for file in files], prototypes=chosen, pictures=len(pictures))


# ----------------------------------------------------------------------------------------- groups


def paint(segments: Tensor, num_prototypes: int) -> np.ndarray:
    """segments (... y x) in 0..k-1 -> (... y x 3) uint8 in the colours of their prototypes."""
    return palette(num_prototypes)[segments.numpy()]


def save_groups(
    file: str | Path, images: Tensor, groups: Tensor, truth: Tensor, num_prototypes: int, class_names: Sequence[str],
    matching: dict[str, int | None] | None = None, iou: dict[str, float | None] | None = None,
) -> None:  # fmt: skip
    """Pictures, the groups found in them, and the truth in the colours of the prototypes matched to the classes.

    images (n 3 y x) uint8; groups (n y x) in 0..k-1; truth (n y x) in 0..t-1 or IGNORE; matching (class -> prototype)
    and iou (class -> IoU) as in the report on the whole data set; without it these pictures are matched. At most 8.
    """
    images, groups, truth = images[:8].cpu(), groups[:8].cpu(), truth[:8].cpu().long()
    if matching is None:
        classes = metrics.match(metrics.confusion_matrix(groups, truth, num_prototypes, len(class_names))).tolist()
        matching = {name: classes.index(c) if c in classes else None for c, name in enumerate(class_names)}
    colors = palette(num_prototypes)
    of_class = np.full((metrics.IGNORE + 1, 3), GREY, dtype=np.uint8)
    for c, name in enumerate(class_names):
        of_class[c] = GREY if matching.get(name) is None else colors[matching[name]]

    n = len(images)
    figure = Figure((1.45 * max(n, 4) + 0.6, 6.2), layout="constrained")
    figure.suptitle("Scenes never trained on, and the groups found in them without a label", fontsize=13)
    rows = {"scene": rearrange(images, "n c y x -> n y x c").numpy(), "groups found": colors[groups.numpy()],
            "truth": of_class[truth.numpy()]}
    axes = figure.subplots(3, n, squeeze=False)
    for row, (name, pictures) in enumerate(rows.items()):
        for axis, picture in zip(axes[row], pictures):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(name, fontsize=11)

    def swatch(color, label: str) -> Patch:
        return Patch(facecolor=np.array(color) / 255, label=label)

    legend = []
    for c, name in enumerate(class_names):
        prototype, found = matching.get(name), (iou or {}).get(name)
        owner = "no prototype" if prototype is None else f"prototype {prototype}"
        legend.append(swatch(of_class[c], f"{name}: {owner}" + ("" if found is None else f", IoU {found:.2f}")))
    others = [k for k in range(num_prototypes) if k not in matching.values() and (groups == k).any()]
    legend += [swatch(colors[k], f"prototype {k}, no class of its own") for k in others[:8]]
    key = figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False, title=(
        "One colour is one prototype, in every scene. The truth wears the colour of the prototype matched with each "
        "class:\nwhere the two lower rows agree, the prototype has found the class."))
    key.get_title().set_multialignment("center")
    figure.savefig(file, dpi=130)


def strongest(soft: Tensor, count: int) -> list[int]:
    """The prototypes with the most assignment in a picture, soft (k h w), the strongest first."""
    return soft.sum(dim=(1, 2)).topk(min(count, len(soft))).indices.tolist()


def principal_colors(embeddings: Tensor, size: tuple[int, int]) -> Tensor:
    """embeddings (b d h w) -> their first three principal components as colours (b y x 3) in 0..1.

    The components are those of all pictures together, so that equal colours mean alike features across pictures.
    """
    b, _, h, w = embeddings.shape
    rows = F.normalize(rearrange(embeddings, "b d h w -> (b h w) d"), dim=1)  # cosines are what the method compares
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()  # else a matter of the library
    parts = F.pad(rows @ (signs * directions).T, (0, 3 - len(directions)))
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    parts = ((parts - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    maps = rearrange(parts, "(b h w) c -> b c h w", b=b, h=h, w=w)
    return rearrange(F.interpolate(maps, size, mode="bicubic").clamp(0, 1), "b c y x -> b y x c")


@torch.no_grad()
def save_parts(file: Path, network: GroupingNetwork, images: Tensor, temperature: float, slots: int = 4) -> None:
    """One row per picture: it, its groups, the soft assignment of its strongest slots, the PCA of its features.

    images (b 3 y x) uint8; temperature: of the soft assignment. Draws to a file.
    """
    embeddings, similarity = (each.cpu() for each in network(normalize(images.to(network.prototypes.weight.device))))
    size, k = images.shape[-2:], similarity.shape[1]
    segments, soft, colors = winner(similarity, size), assignment(similarity, temperature), palette(k) / 255
    features = principal_colors(embeddings.float(), size)
    slots = min(slots, k)
    figure = Figure((1.7 * (3 + slots), 1.95 * len(images) + 0.9), layout="constrained")
    figure.suptitle("Colours mean prototypes, the same in every row. A slot's map: how surely each place belongs to "
                    "its prototype.\nFeatures: the first three principal components of the embeddings; like colours, "
                    "like features.", fontsize=9)
    axes = figure.subplots(len(images), 3 + slots, squeeze=False)
    for row, image in zip(range(len(images)), images):
        picture = rearrange(image, "c y x -> y x c").numpy() / 255
        gray = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2) * 0.6
        shown = [("picture", picture), (f"{len(segments[row].unique())} groups", colors[segments[row].numpy()])]
        for slot in strongest(soft[row], slots):
            sure = F.interpolate(soft[row : row + 1, slot : slot + 1], size, mode="bilinear")[0, 0].numpy()[..., None]
            share = float(soft[row, slot].mean())
            shown.append((f"slot {slot}: {share:.0%}", gray * (1 - sure) + colors[slot] * sure))
        shown.append(("features", features[row].numpy()))
        for axis, (title, drawn) in zip(axes[row], shown):
            axis.imshow(drawn, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    figure.savefig(file, dpi=130)


def groups(args: argparse.Namespace) -> dict:
    network, config = load_network(args.checkpoint, args.which, args.device)
    dataset = "folder" if args.images or args.data_dir else "toy"
    view = centre_view(args.size or picture_size(dataset, config))
    if args.images:
        pictures = ImageFiles(".", np.array([str(Path(image).absolute()) for image in args.images]))
    else:
        pictures = open_pictures(dataset, args.data_dir, args.count)
    try:
        images = torch.stack([view(pictures[index]) for index in range(len(pictures))])
    except BadImage as bad:
        raise ValueError(f"cannot read {bad.name}: {bad.reason}") from None
    save_parts(Path(args.output), network, images, config.get("temp_teacher", 0.07), args.slots)  # 0.07 [P]
    return dict(files=[args.output], pictures=len(images))


# --------------------------------------------------------------------------------------- training


def read_log(run: Path) -> tuple[list[dict], dict]:
    """The lines of a run's log.jsonl, by step, and its configuration ({} without config.json).

    A line that was being written when the run died is left out; a step that was repeated after resuming counts once.
    """
    file = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not file.is_file():
        raise ValueError(f"no {file}: give the output directory of a run")
    records = {}
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    if not records:
        raise ValueError(f"{file} has no line with a step yet: let the run go on for a while")
    config = file.with_name("config.json")
    return [records[step] for step in sorted(records)], json.loads(config.read_text()) if config.is_file() else {}


def chance_lines(records: list[dict], config: dict) -> dict[str, list[float]]:
    """What a network that knows nothing would log: a value per record, for each key that has one. {} without k.

    group_loss: uniform assignments, ln k in each of two directions. slot_loss: every key equally likely, the keys being
    the occupied slots of the batch, with the factor 2 temp_slot in each of two directions.
    """
    k = config.get("num_prototypes")
    if not k:
        return {}
    images = config["batch_size"] / config.get("accumulate", 1)  # those of one pass are contrasted
    keys = [max(record["occupied_per_image"] * images, 1) for record in records]
    chance = dict(
        group_loss=[2 * math.log(k)] * len(records), prototypes_used=[k] * len(records),
        entropy=[math.log(k)] * len(records), agreement=[1 / k] * len(records),
    )  # fmt: skip
    if config.get("slot_loss", "ctr") == "ctr":
        chance["slot_loss"] = [4 * config.get("temp_slot", 0.2) * math.log(count) for count in keys]
    return chance


SECOND_AXIS = {"Schedules": ("momentum_teacher", "teacher's momentum"), "Speed": ("data_seconds", "s waiting")}


def save_training(file: Path, records: list[dict], config: dict) -> None:
    """Eight panels; under each title, what a healthy run looks like."""
    chance, step = chance_lines(records, config), [record["step"] for record in records]
    panels = [  # title, what is healthy, key -> label, key of the dashed line, its label
        ("Group loss", "leaves the line early\n(on it, the assignment is uniform)", {"group_loss": ""}, "group_loss",
         "uniform: 2 ln k"),
        ("Slot loss", "well below chance\n(it may rise while groups split)", {"slot_loss": ""}, "slot_loss", "chance"),
        ("Prototypes", "a few per picture,\nmost of them in use", {"occupied_per_image": "per picture",
         "prototypes_used": "in use"}, "prototypes_used", "k"),
        ("Entropy of the teacher", "low per pixel, high on average\n(both high: uniform; both low: one prototype)",
         {"entropy_teacher": "per pixel", "entropy_mean": "of the mean"}, "entropy", "ln k"),
        ("Student agrees with teacher", "rises far above chance", {"agreement": ""}, "agreement", "chance: 1 / k"),
        ("Gradient norm", "settles; no step is skipped", {"grad_norm": "norm", "skipped_steps": "skipped"},
         "", ""),
        ("Schedules", "the learning rate ends near 0, the momentum near 1", {"lr": "learning rate"}, "", ""),
        ("Speed", "steady; waiting for data near 0", {"images_per_second": "images / s"}, "", ""),
    ]
    figure = Figure((14, 6.8), layout="constrained")
    figure.suptitle(f"{config.get('preset', 'run')}: {len(records)} records up to step {step[-1]}. Never judge by the "
                    "total loss: a collapsed run can have the lowest.", fontsize=11)
    for axis, (title, healthy, keys, dashed, dashed_label) in zip(figure.subplots(2, 4).flat, panels):
        for (key, label), color in zip(keys.items(), (BLUE, ORANGE)):
            axis.plot(step, [record.get(key, math.nan) for record in records], color=color, label=label or None)
        if dashed in chance:
            axis.plot(step, chance[dashed], "--", color="black", lw=1, label=dashed_label)
        axis.set_title(title, fontsize=10, loc="left", pad=24)
        axis.text(0, 1.02, f"healthy: {healthy}", transform=axis.transAxes, fontsize=7.5, color="0.3")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
        if title in SECOND_AXIS:
            key, label = SECOND_AXIS[title]
            other = axis.twinx()
            other.plot(step, [record.get(key, math.nan) for record in records], color=ORANGE, label=label)
            other.spines["top"].set_visible(False)
            axis.set_ylabel(next(iter(keys.values())), color=BLUE, fontsize=8)
            other.set_ylabel(label, color=ORANGE, fontsize=8)
        elif len(axis.get_lines()) > 1:
            axis.legend(frameon=False, fontsize=8)
    figure.supxlabel("optimiser step", fontsize=9)
    figure.savefig(file, dpi=110)


def training(args: argparse.Namespace) -> dict:
    records, config = read_log(Path(args.run_dir))
    save_training(Path(args.output), records, config)
    notice = {} if config else dict(notice="no config.json beside the log, so no chance lines are drawn")
    return dict(files=[args.output], records=len(records), last_step=records[-1]["step"], **notice)


# ----------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser("visualize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prototypes | groups | training")
    for run, text in ((prototypes, "the best segments of each prototype, as in figure 3"),
                      (groups, "for some pictures: groups, soft assignments, PCA of the features"),
                      (training, "the curves of a run, beside chance and what healthy looks like")):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.set_defaults(run=run)
        add = command.add_argument
        add("--output", default=f"{run.__name__}.png", help=f"the picture ({run.__name__}.png)")
        if run is training:
            add("run_dir", help="output directory of the run, or its log.jsonl")
            continue
        add("checkpoint", help="last.pth of a run, or a released one; sizes and k come from it, never from options")
        if run is groups:
            add("images", nargs="*", help="picture files; default: the first of --data-dir, else toy scenes")
            add("--count", type=options.positive, default=6, help="pictures, where none is named (6)")
            add("--slots", type=options.positive, default=4, help="soft assignments per picture, strongest first (4)")
        else:
            add("--show", nargs="+", default=["used"], help="used (most active), extremes (five most, five least), all "
                "that are active, or numbers")
            add("--count", type=options.positive, default=12, help="how many of the most used (12)")
            add("--top", type=options.positive, default=5, help="segments per prototype (5, as on the slide)")
            add("--limit", type=options.whole, default=0, help="look through the first N pictures only; 0: all")
            add("--batch-size", type=options.positive, default=16, help="pictures at a time (16)")
            add("--workers", type=options.whole, default=0, help="processes that decode; 2 to 8 help on a GPU (0)")
        add("--data-dir", help="folder of pictures, nested or flat (COCO: its val2017); without it toy scenes")
        add("--size", type=options.positive, help="side, px; default: as in training, toy scenes as drawn")
        add("--which", choices=("teacher", "student"), default="teacher", help="network to look at (teacher)")
        add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: a GPU if there is one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        if "device" in args:
            args.device = processes.start(args.device, timeout=600).device
        result = dict(command=args.command, **args.run(args))
    except (ValueError, OSError) as error:
        print(f"visualize.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
