"""Measure what a checkpoint learned about pictures: its segments, its slots, its features.

    python evaluate.py segmentation runs/toy/last.pth                                toy scenes it has never seen
    python evaluate.py segmentation last.pth --dataset coco_stuff --data-dir COCO    table 5: mIoU and pixel accuracy
    python evaluate.py slots last.pth --data-dir COCO/val2017                        how many are active, and how often
    python evaluate.py probe last.pth --dataset voc --data-dir VOCdevkit             linear and nearest neighbours

Slides: "Understanding the semantic grouping ability: unsupervised semantic segmentation"; "Statistics about the slots".
Differs: the authors released none of this. Segmentation follows PiCIE's published protocol [P], which they say they
used; what each number means stands in metrics.py; the baselines and the probes are ours [U].
Read next: visualize.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from scipy.cluster.vq import kmeans2
from scipy.spatial import KDTree
from torch import Tensor

import toy
from engine import options, processes
from engine.weights import load_network
from grouping import GroupingNetwork
from measures import labels, metrics, probes
from measures.segments import centre_view, open_pictures, picture_size, segment, stream, winner
from photometric import normalize
from slots import occupied

Segmenter = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (b 3 y x) -> segments (b y x), occupied (b k)

# ----------------------------------------------------------------------- unsupervised segmentation


class Tally:
    """What one way of grouping did on a whole data set: counts only, so its size depends on k and the classes alone."""

    def __init__(self, num_groups: int, class_names: Sequence[str]):
        self.class_names = class_names
        self.confusion = torch.zeros(num_groups, len(class_names), dtype=torch.long)  # (k t)
        self.active = torch.zeros(num_groups, dtype=torch.long)  # pictures in which each group is occupied
        self.pictures, self.rand_index = 0, 0.0

    def add(self, segments: Tensor, occupied: Tensor, label: Tensor) -> None:
        """segments (b y x) in 0..k-1; occupied (b k) bool; label (b y x) in 0..t-1 or IGNORE."""
        self.pictures += len(segments)
        self.active += occupied.sum(0)  # over b
        if self.class_names:
            self.confusion += metrics.confusion_matrix(segments, label, len(self.active), len(self.class_names))
            return
        for one, truth in zip(segments, label):  # segments without names: number 3 here is not number 3 there
            counts = metrics.confusion_matrix(one, truth, len(self.active), int(truth.max()) + 1)
            self.rand_index += metrics.adjusted_rand_index(counts)

    def report(self) -> dict:
        usage = dict(occupied_per_image=int(self.active.sum()) / max(self.pictures, 1),
                     prototypes_used=int((self.active > 0).sum()))
        if not self.class_names:
            return dict(adjusted_rand_index=self.rand_index / max(self.pictures, 1), **usage)
        one, many = metrics.match(self.confusion), metrics.majority(self.confusion)
        prototype_of = {int(c): k for k, c in enumerate(one) if c != metrics.UNMATCHED}
        return dict(
            nmi=metrics.nmi(self.confusion),
            miou=metrics.miou(self.confusion, one),
            accuracy=metrics.pixel_accuracy(self.confusion, one),
            miou_many_to_one=metrics.miou(self.confusion, many),
            accuracy_many_to_one=metrics.pixel_accuracy(self.confusion, many),
            **usage,
            iou=by_class(self.class_names, metrics.iou(self.confusion, one)),
            matching={name: prototype_of.get(c) for c, name in enumerate(self.class_names)},
        )


def by_class(class_names: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """values (t) under their names, None for nan, which JSON lacks: a class without a labelled pixel."""
    return {name: None if math.isnan(value) else value for name, value in zip(class_names, values.tolist())}


def rgb_kmeans(pixels: Tensor, num_groups: int, seed: int = 0) -> Segmenter:
    """k-means on colours alone, the baseline that anything learned must beat. pixels (n 3) uint8 to fit it to."""
    colors = pixels.double().numpy()
    distinct = len(np.unique(colors, axis=0))  # more centres than colours cannot be told apart
    start = "++" if num_groups <= 64 else "points"  # scipy's k-means++ takes k * k * n steps: minutes from 256 on
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # then it keeps its place, and wins nothing
        centers, _ = kmeans2(colors, min(num_groups, distinct), minit=start, rng=np.random.default_rng(seed), iter=20)
    tree = KDTree(centers)

    def segmenter(images: Tensor) -> tuple[Tensor, Tensor]:
        b, _, y, x = images.shape
        nearest = torch.from_numpy(tree.query(rearrange(images, "b c y x -> (b y x) c").cpu().numpy())[1])
        segments = rearrange(nearest, "(b y x) -> b y x", b=b, y=y, x=x)
        present = torch.zeros(b, num_groups, dtype=torch.bool)
        return segments, present.scatter(1, rearrange(segments, "b y x -> b (y x)"), True)

    return segmenter


def sample_pixels(batches: Iterable[Tensor], per_picture: int = 256, seed: int = 0) -> Tensor:
    """batches of images (b 3 y x) -> colours (n 3) of `per_picture` random pixels of each."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for images in batches:
        pixels = rearrange(images, "b c y x -> b (y x) c")
        samples += [each[torch.randint(len(each), (per_picture,), generator=generator)] for each in pixels]
    return torch.cat(samples)


def compare(
    network: GroupingNetwork, untrained: GroupingNetwork, by_color: Segmenter, batches: Iterable, class_names
) -> dict:
    """The numbers of the trained network, and under `untrained` and `rgb_kmeans` the same numbers of the baselines.

    batches of (indices (b), (images (b 3 y x) uint8, label (b y x))) are read once for all three.
    """
    methods = dict(trained=partial(segment, network), untrained=partial(segment, untrained), rgb_kmeans=by_color)
    tallies = {name: Tally(network.prototypes.num_embeddings, class_names) for name in methods}
    for _, (images, label) in batches:
        for name, segmenter in methods.items():
            tallies[name].add(*segmenter(images), label)
    reports = {name: tally.report() for name, tally in tallies.items()}
    return {**reports.pop("trained"), **reports}


def toy_report(
    network: GroupingNetwork, untrained_network: GroupingNetwork, images: Tensor, labels: Tensor, device="cpu",
    class_names: Sequence[str] = toy.CLASS_NAMES, batch_size: int = 64,
) -> dict:  # fmt: skip
    """`compare` on pictures in memory: images (n 3 y x) uint8 and labels (n y x) of scenes never trained on."""
    networks = [each.to(device).eval() for each in (network, untrained_network)]
    by_color = rgb_kmeans(sample_pixels(images[:256].split(batch_size)), network.prototypes.num_embeddings)
    batches = ((None, pair) for pair in zip(images.split(batch_size), labels.split(batch_size)))
    return compare(*networks, by_color, batches, class_names)


def untrained_like(config: dict, device: torch.device | str, seed: int = 0) -> GroupingNetwork:
    """The same network with random weights and random prototypes: what its architecture gives away for free."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = ("arch", "num_prototypes", "dim_hidden", "dim_out")
        return GroupingNetwork(**{name: config[name] for name in names}).to(device).eval()


COLUMNS = {  # key -> heading; a table shows those that its report has
    "adjusted_rand_index": "Rand index", "nmi": "NMI", "miou": "mIoU", "accuracy": "accuracy",
    "miou_many_to_one": "mIoU n:1", "accuracy_many_to_one": "acc. n:1",
    "occupied_per_image": "occupied", "prototypes_used": "used",
}  # fmt: skip
ROWS = {"trained": "trained", "untrained": "untrained network", "rgb_kmeans": "k-means on RGB"}


def format_table(report: dict) -> str:
    """A report of `compare` for the eye: one row per method."""
    keys = [key for key in COLUMNS if key in report]
    lines = [" " * 18 + "".join(f"{COLUMNS[key]:>12}" for key in keys)]
    for row, name in ROWS.items():
        numbers = report if row == "trained" else report[row]
        cells = (f"{numbers[key]:>12}" if key == "prototypes_used" else f"{numbers[key]:>12.3f}" for key in keys)
        lines.append(f"{name:<18}" + "".join(cells))
    if "miou" in keys:
        lines.append("mIoU, accuracy: prototypes matched one-to-one with classes. n:1: each gets its majority class,")
        lines.append("which flatters a large k. occupied: prototypes per picture. used: in any picture.")
    return "\n".join(lines)


def segmentation(args: argparse.Namespace) -> dict:
    network, config = load_network(args.checkpoint, args.which, args.device)
    untrained = untrained_like(config, args.device)
    pictures = open_labelled(args)
    sizes = args.size or ([picture_size("toy", config)] if args.dataset == "toy" else [320, 224])  # 320 [P], 224 [U]
    result = dict(notice=pictures.notice, classes=len(pictures.class_names), sizes={})
    by_color = None
    for size in sizes:
        def batches(some, title, size=size):
            return stream(some, partial(labels.square, size=size), args.batch_size, args.workers, title)

        if by_color is None:
            spread = pictures.subset(torch.linspace(0, len(pictures) - 1, min(256, len(pictures))).long().tolist())
            by_color = rgb_kmeans(sample_pixels(images for _, (images, _) in batches(spread, "k-means")),
                                  config["num_prototypes"])
        report = compare(network, untrained, by_color, batches(pictures, f"{size} px"), pictures.class_names)
        about = f"{args.dataset}: {pictures.notice}" if pictures.notice else args.dataset
        print(f"\n{len(pictures)} pictures of {size} px, {about}, k = {config['num_prototypes']}")
        print(format_table(report))
        for name, value in report.get("iou", {}).items():
            print(f"  {name:<18}{'absent' if value is None else f'{value:.3f}'}")
        result["sizes"][size] = report
    return dict(pictures=len(pictures), num_prototypes=config["num_prototypes"], **result)


# -------------------------------------------------------------------------------- slot statistics


@torch.no_grad()
def slot_counts(network: GroupingNetwork, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """In how many pictures each slot is active (k), and how many pictures have 0, 1, ... k active slots (k + 1)."""
    k = network.prototypes.num_embeddings
    active, pictures_with = torch.zeros(k, dtype=torch.long), torch.zeros(k + 1, dtype=torch.long)
    for _, images in batches:
        owned = occupied(network(normalize(images.to(network.prototypes.weight.device)))[1]).cpu()
        active += owned.sum(0)  # over b
        pictures_with += torch.bincount(owned.sum(1), minlength=k + 1)  # over k
    return active, pictures_with


def slot_report(active: Tensor, pictures_with: Tensor) -> dict:
    """The statistics of the slides from the counts of `slot_counts`; the least active of those ever active."""
    read = max(int(pictures_with.sum()), 1)
    seen = [int(k) for k in active.argsort(descending=True, stable=True) if active[k] > 0]
    top, bottom = ([dict(prototype=k, pictures=int(active[k])) for k in some] for some in (seen[:5], seen[:-6:-1]))
    return dict(pictures=read, num_prototypes=len(active), occupied_per_image=int(active.sum()) / read,
                prototypes_used=len(seen), top=top, bottom=bottom, active=active.tolist(),
                pictures_with=pictures_with.tolist())


def slots(args: argparse.Namespace) -> dict:
    network, config = load_network(args.checkpoint, args.which, args.device)
    pictures = open_pictures(args.dataset, args.data_dir, args.limit)
    view = centre_view(args.size or picture_size(args.dataset, config))
    counts = slot_counts(network, stream(pictures, view, args.batch_size, args.workers, "slots"))
    report = slot_report(*counts)
    plot_slots(Path(args.plot), report)
    print(f"{report['occupied_per_image']:.2f} slots are active per picture, over {report['pictures']} pictures; "
          f"{report['prototypes_used']} of {report['num_prototypes']} are active somewhere")
    for title, some in (("most often", report["top"]), ("least often, of those ever active", report["bottom"])):
        print(f"{title}: " + ", ".join(f"prototype {each['prototype']} ({each['pictures']})" for each in some))
    print(f"the plot is in {args.plot}; visualize.py prototypes --show extremes draws their best segments")
    return dict(**report, plot=args.plot)


def plot_slots(file: Path, report: dict) -> None:
    """Two panels: how many slots a picture has, and how often each slot is active."""
    from matplotlib.figure import Figure  # draws to files, with no window and no global state

    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(number for number, pictures in enumerate(report["pictures_with"]) if pictures or number == 0)
    left.bar(range(most + 1), report["pictures_with"][: most + 1], color="#0072B2")
    left.axvline(report["occupied_per_image"], color="#D55E00", label=f"mean {report['occupied_per_image']:.1f}")
    left.set(title="How many slots are active in a picture", xlabel="active slots", ylabel="pictures")
    left.legend(frameon=False)
    counts = sorted(report["active"], reverse=True)
    right.bar(range(1, len(counts) + 1), counts, width=1.0 if len(counts) > 60 else 0.8, color="#0072B2")
    right.set(title="How often each slot is active", xlabel="slots, most active first",
              ylabel=f"of {report['pictures']} pictures")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


# --------------------------------------------------------------------------------- frozen probes


@torch.no_grad()
def score_probes(network: GroupingNetwork, classifiers: dict[str, Callable], batches: Iterable, class_names) -> dict:
    """mIoU and accuracy of each probe, its scores enlarged to the label, on batches as in `compare`."""
    t = len(class_names)
    counts = {name: torch.zeros(t, t, dtype=torch.long) for name in classifiers}
    for _, (images, label) in batches:
        maps = network.backbone(normalize(images.to(network.prototypes.weight.device))).float()
        for name, classify in classifiers.items():
            counts[name] += metrics.confusion_matrix(winner(classify(maps), label.shape[-2:]).cpu(), label, t, t)
    own = torch.arange(t)  # a probe knows the classes by name
    return {name: dict(miou=metrics.miou(counted, own), accuracy=metrics.pixel_accuracy(counted, own),
                       iou=by_class(class_names, metrics.iou(counted, own)))
            for name, counted in counts.items()}  # fmt: skip


def probe(args: argparse.Namespace) -> dict:
    network, config = load_network(args.checkpoint, args.which, args.device)
    if args.split == "train":
        raise ValueError("a probe learns on the split train: test it on another one, or leave --split out")
    seen, unseen = open_labelled(args, "train"), open_labelled(args, args.split or "val")
    if not unseen.class_names:
        raise ValueError(f"a probe learns classes, and the segments of {args.dataset} have no names: "
                         "measure them with the subcommand segmentation")
    if seen.class_names != unseen.class_names:
        raise ValueError(f"the split train has {len(seen.class_names)} classes and the one to test on "
                         f"{len(unseen.class_names)}: say how many there are by --num-classes or classes.txt")
    if args.labelled:
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
        seen = seen.subset(order[: args.labelled].sort().values.tolist())
    size = (args.size or [picture_size("toy", config) if args.dataset == "toy" else 320])[0]

    def batches(pictures, title):
        return stream(pictures, partial(labels.square, size=size), args.batch_size, args.workers, title)

    result = dict(labelled_pictures=len(seen), pictures=len(unseen), size=size)
    for row, net in (("trained", network), ("random_backbone", untrained_like(config, args.device))):
        cells = probes.collect_cells(net.backbone, batches(seen, f"{row}: learn"), len(seen), len(unseen.class_names))
        features, shares = (each.to(args.device) for each in cells)
        pair = dict(linear=probes.linear_probe(features, shares), neighbors=probes.neighbor_probe(features, shares))
        result[row] = score_probes(net, pair, batches(unseen, f"{row}: test"), unseen.class_names)
    print(f"{len(seen)} labelled pictures, tested on {len(unseen)} others, {size} px\n{'':<18}"
          "linear mIoU    accuracy   neighbours mIoU    accuracy")
    for row in ("trained", "random_backbone"):
        linear, near = result[row]["linear"], result[row]["neighbors"]
        print(f"{row.replace('_', ' '):<18}{linear['miou']:>11.3f}{linear['accuracy']:>12.3f}"
              f"{near['miou']:>18.3f}{near['accuracy']:>12.3f}")
    return result


# ------------------------------------------------------------------------------------ command line


def open_labelled(args: argparse.Namespace, split: str | None = None) -> labels.Labelled:
    """The labelled pictures that the options ask for."""
    own = dict(
        toy=dict(count=args.toy_scenes, preset=args.toy_preset),
        coco_stuff=dict(list_file=args.list),
        folder=dict(num_classes=args.num_classes),
    )
    pictures = labels.open_labelled(args.dataset, args.data_dir, split or args.split, **own.get(args.dataset, {}))
    return pictures.subset(range(min(args.limit, len(pictures)))) if args.limit else pictures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser("evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="segmentation | slots | probe")
    for run, text in ((segmentation, "mIoU and accuracy of segments against labels, beside two baselines"),
                      (slots, "how many slots are active per picture, and how often each"),
                      (probe, "linear and nearest-neighbour segmentation on frozen features")):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.set_defaults(run=run)
        add = command.add_argument
        add("checkpoint", help="last.pth of a run, or a released one; sizes and k come from it, never from options")
        add("--which", choices=("teacher", "student"), default="teacher", help="network to measure (default teacher)")
        add("--data-dir", help="folder of the data set; not needed for toy scenes")
        add("--limit", type=options.whole, default=0, help="use the first N pictures only, for a quick look; 0: all")
        add("--batch-size", type=options.positive, default=16, help="pictures at a time; changes no result (16)")
        add("--workers", type=options.whole, default=0, help="processes that decode; 2 to 8 help on a GPU (0: none)")
        add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: a GPU if there is one")
        add("--json", help="also write the JSON object to this file")
        if run is slots:
            add("--dataset", choices=("folder", "toy"), help="default: folder with --data-dir, else toy")
            add("--size", type=options.positive, help="side, px (default: as in training; toy scenes as drawn)")
            add("--plot", default="slots.png", help="picture of both statistics (slots.png)")
            continue
        add("--dataset", choices=tuple(labels.DATASETS), help="default: folder with --data-dir, else toy")
        add("--split", help="part to measure on; default: val, or everything of a folder without parts")
        add("--size", type=options.positive, nargs="+", help="side, px; default 320 224, toy scenes as drawn")
        add("--list", help="coco_stuff: file of picture ids, one per line; default: the curated ones, by rule")
        add("--num-classes", type=options.positive, help="folder: ids are below this; default: classes.txt or a look")
        add("--toy-scenes", type=options.positive, default=256, help="toy: how many (256)")
        add("--toy-preset", choices=tuple(toy.PRESETS), default="scene", help="toy: which kind (scene)")
        if run is probe:
            add("--labelled", type=options.whole, default=0, help="learn from N random labelled pictures only; 0: all")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        args.device = processes.start(args.device, timeout=600).device
        args.dataset = args.dataset or ("folder" if args.data_dir else "toy")
        result = dict(command=args.command, checkpoint=args.checkpoint, which=args.which, dataset=args.dataset,
                      data_dir=args.data_dir, **args.run(args))  # fmt: skip
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
