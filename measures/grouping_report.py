"""How well the groups of a network agree with labels, beside an untrained network and colors alone.

Slide: "Understanding the semantic grouping ability: unsupervised semantic segmentation".
Paper: table 5.
Differs: the authors released no evaluation code; the protocol is PiCIE's [P], the baselines are
ours [U]. metrics.py says what each number means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from grouping import GroupingNetwork
from measures import metrics
from measures.color_groups import Segmenter, rgb_kmeans, sample_pixels
from measures.segments import segment

# ------------------------------------------------------------------------------------ the numbers


class Tally:
    """The counts of one way of grouping on a data set: their size depends on k and t alone."""

    def __init__(self, num_groups: int, class_names: Sequence[str]):
        self.class_names = class_names
        self.confusion = torch.zeros(num_groups, len(class_names), dtype=torch.long)  # (k t)
        self.active = torch.zeros(num_groups, dtype=torch.long)  # (k): images that occupy it
        self.images, self.labeled_images, self.rand_index = 0, 0, 0.0

    def add(self, segments: Tensor, owned: Tensor, label: Tensor) -> None:
        """segments (b y x) in 0..k-1; owned (b k) bool; label (b y x) in 0..t-1 or IGNORE."""
        k = len(self.active)
        self.images += len(segments)
        self.labeled_images += int((label != metrics.IGNORE).flatten(1).any(dim=1).sum())
        self.active += owned.sum(0)  # over b
        if self.class_names:
            self.confusion += metrics.confusion_matrix(segments, label, k, len(self.class_names))
            return
        for one, target in zip(segments, label):  # without classes, an id is of one image only
            if (target != metrics.IGNORE).any():
                counts = metrics.confusion_matrix(one, target, k, int(target.max()) + 1)
                self.rand_index += metrics.adjusted_rand_index(counts)

    def report(self) -> dict:
        """All numbers under their names. Raises ValueError where no pixel has a label."""
        if not self.labeled_images:
            raise ValueError(f"nothing is labeled: all pixels of the {self.images} labels are "
                             f"{metrics.IGNORE} (no class)")
        usage = dict(occupied_per_image=int(self.active.sum()) / self.images,
                     prototypes_used=int((self.active > 0).sum()))
        if not self.class_names:
            return dict(adjusted_rand_index=self.rand_index / self.labeled_images, **usage)
        one, many = metrics.match(self.confusion), metrics.majority(self.confusion)
        prototype_of = {int(t): k for k, t in enumerate(one) if t != metrics.UNMATCHED}
        return dict(
            nmi=metrics.nmi(self.confusion),
            miou=metrics.miou(self.confusion, one),
            accuracy=metrics.pixel_accuracy(self.confusion, one),
            miou_many_to_one=metrics.miou(self.confusion, many),
            accuracy_many_to_one=metrics.pixel_accuracy(self.confusion, many),
            **usage,
            iou=by_class(self.class_names, metrics.iou(self.confusion, one)),
            matching={name: prototype_of.get(t) for t, name in enumerate(self.class_names)},
        )


def by_class(class_names: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """values (t) under their names; None for nan, which JSON lacks: a class without a pixel."""
    return {name: None if math.isnan(value) else value
            for name, value in zip(class_names, values.tolist())}


def compare(
    network: GroupingNetwork, untrained: GroupingNetwork, by_color: Segmenter,
    batches: Iterable[tuple[Tensor, tuple[Tensor, Tensor]]], class_names: Sequence[str],
) -> dict:  # fmt: skip
    """The numbers of the network, and under `untrained` and `rgb_kmeans` those of the baselines.

    batches of (indices (b), (images (b 3 y x) uint8, label (b y x))) are read once for all three.
    Raises ValueError where nothing is labeled.
    """
    methods = dict(trained=partial(segment, network), untrained=partial(segment, untrained),
                   rgb_kmeans=by_color)
    k = network.prototypes.num_embeddings
    tallies = {name: Tally(k, class_names) for name in methods}
    for _, (images, label) in batches:
        for name, segmenter in methods.items():
            tallies[name].add(*segmenter(images), label)
    reports = {name: tally.report() for name, tally in tallies.items()}
    return {**reports.pop("trained"), **reports}


def compare_in_memory(
    network: GroupingNetwork, untrained: GroupingNetwork, images: Tensor, labels: Tensor,
    class_names: Sequence[str], batch_size: int = 64,
) -> dict:  # fmt: skip
    """`compare` on images (b 3 y x) uint8 and labels (b y x) in memory, `batch_size` at a time."""
    pixels = sample_pixels(images[:256].split(batch_size))
    by_color = rgb_kmeans(pixels, network.prototypes.num_embeddings)
    batches = ((torch.empty(0), pair)
               for pair in zip(images.split(batch_size), labels.split(batch_size)))
    return compare(network.eval(), untrained.eval(), by_color, batches, class_names)


# ---------------------------------------------------------------------------------- for the screen

COLUMNS = {  # key -> heading; a table shows those that its report has
    "adjusted_rand_index": "adjusted Rand", "nmi": "NMI", "miou": "mIoU", "accuracy": "accuracy",
    "miou_many_to_one": "mIoU n:1", "accuracy_many_to_one": "acc. n:1",
    "occupied_per_image": "occupied", "prototypes_used": "used",
}  # fmt: skip
ROWS = {"trained": "trained", "untrained": "untrained network", "rgb_kmeans": "k-means on RGB"}
EXPLANATION = """\
mIoU, accuracy: prototypes matched one-to-one with classes. n:1: each gets its majority class,
which favors a large k. occupied: prototypes per image. used: in any image."""


def format_table(report: dict) -> str:
    """A report of `compare` as text: one row per method."""
    keys = [key for key in COLUMNS if key in report]
    width = {key: max(12, len(COLUMNS[key]) + 2) for key in keys}
    lines = [" " * 18 + "".join(f"{COLUMNS[key]:>{width[key]}}" for key in keys)]
    for row, name in ROWS.items():
        numbers = report if row == "trained" else report[row]
        digits = {key: "" if key == "prototypes_used" else ".3f" for key in keys}
        cells = (f"{numbers[key]:>{width[key]}{digits[key]}}" for key in keys)
        lines.append(f"{name:<18}" + "".join(cells))
    return "\n".join([*lines, EXPLANATION] if "miou" in keys else lines)


def format_classes(report: dict) -> str:
    """The IoU of every class as text, one per line; the absent ones together on the last line."""
    found = report.get("iou", {})
    lines = [f"  {name:<18}{value:.3f}" for name, value in found.items() if value is not None]
    absent = [name for name, value in found.items() if value is None]
    if absent:
        more = f" and {len(absent) - 6} more" if len(absent) > 6 else ""
        lines.append(f"  without a pixel: {', '.join(absent[:6])}{more}")
    return "\n".join(lines)
