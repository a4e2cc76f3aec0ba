"""Groups of a network against labels, beside an untrained network and k-means on colors."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.cluster.vq import kmeans2
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn import Module

from measures import metrics
from measures.layouts import unlabeled
from measures.streams import Batches
from photometric import normalize
from slots import occupied

Segmenter = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (b 3 y x) -> (b y x), (b k) bool
Names = Sequence[str]  # of the classes; none for segments without classes


def winner(maps: Tensor, size: tuple[int, int], chunk: int = 64) -> Tensor:
    """(b k h w) -> the map that is largest at each pixel (b y x), the lower one at a tie."""
    # The maps are enlarged, not the decisions [P]. 2,048 maps of 320 px take 0.8 GB per image.
    best = maps.new_full((len(maps), *size), -torch.inf)
    largest = torch.zeros_like(best, dtype=torch.long)
    for first in range(0, maps.shape[1], chunk):
        enlarged = F.interpolate(maps[:, first : first + chunk], size, mode="bilinear")
        score, index = enlarged.max(dim=1)  # over k
        largest = torch.where(score > best, index + first, largest)
        best = torch.maximum(score, best)
    return largest


@torch.no_grad()
def segment(network: Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """images (b 3 y x) uint8 -> segments (b y x), and the occupied prototypes (b k); on the CPU."""
    _, similarity = network(normalize(images.to(network.prototypes.weight.device)))
    return winner(similarity, images.shape[-2:]).cpu(), occupied(similarity).cpu()


def kmeans(rows: np.ndarray, k: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """k-means, 20 rounds: rows (n d) -> centers (k d), a function of the seed."""
    # k-means++ takes k * k * n steps, which is minutes from k = 256 on.
    start, rng = "++" if k <= 64 else "points", np.random.default_rng(seed)
    with warnings.catch_warnings():  # an empty cluster keeps its center, which does no harm
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        return kmeans2(rows.astype(np.float64), k, minit=start, rng=rng, iter=20)[0]


def rgb_kmeans(pixels: Tensor, num_groups: int, seed: int = 0) -> Segmenter:
    """k-means on pixels (n 3) uint8: images go to the nearest of the colors found."""
    k = min(num_groups, len(pixels.unique(dim=0)))  # no more centers than colors
    tree = KDTree(kmeans(pixels.numpy(), k, seed))

    def segmenter(images: Tensor) -> tuple[Tensor, Tensor]:
        colors = rearrange(images, "b rgb y x -> b y x rgb").cpu().numpy()
        segments = torch.from_numpy(tree.query(colors)[1])
        present = torch.zeros(len(images), num_groups, dtype=torch.bool)
        return segments, present.scatter(1, segments.flatten(1), True)

    return segmenter


def sample_pixels(batches: Iterable[Tensor], per_image: int = 256, seed: int = 0) -> Tensor:
    """batches of images (b 3 y x) -> colors (n 3) of random pixels of each."""
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(seed))
    images = (image for batch in batches for image in rearrange(batch, "b c y x -> b (y x) c"))
    return torch.cat([image[draw(len(image), (per_image,))] for image in images])


class Tally:
    """The counts of one way of grouping on a data set."""

    def __init__(self, num_groups: int, class_names: Names):
        self.class_names = class_names
        self.confusion = torch.zeros(num_groups, len(class_names), dtype=torch.long)  # (k t)
        self.active = torch.zeros(num_groups, dtype=torch.long)  # (k): images that occupy it
        self.images, self.rand_indices = 0, []

    def add(self, segments: Tensor, owned: Tensor, label: Tensor) -> None:
        """segments (b y x) in 0..k-1; owned (b k) bool; label (b y x) in 0..t-1 or IGNORE."""
        self.images += len(segments)
        self.active += owned.sum(0)  # over b
        if self.class_names:
            t = len(self.class_names)
            self.confusion += metrics.confusion_matrix(segments, label, len(self.active), t)
        else:  # an id is of one image only
            self.rand_indices += metrics.rand_indices(segments, label)

    def report(self) -> dict:
        """All numbers. Raises ValueError where no pixel has a label."""
        if not (self.confusion.any() or self.rand_indices):
            raise unlabeled(f"the {self.images} labels")
        per_image, used = int(self.active.sum()) / self.images, int((self.active > 0).sum())
        usage = dict(occupied_per_image=per_image, prototypes_used=used)
        if not self.class_names:
            mean = sum(self.rand_indices) / len(self.rand_indices)
            return dict(adjusted_rand_index=mean, **usage)
        one, many = metrics.match(self.confusion), metrics.majority(self.confusion)
        owner = dict(zip(one.tolist(), range(len(one))))  # class -> prototype
        return dict(
            nmi=metrics.nmi(self.confusion),
            miou=metrics.miou(self.confusion, one),
            accuracy=metrics.pixel_accuracy(self.confusion, one),
            miou_many_to_one=metrics.miou(self.confusion, many),
            accuracy_many_to_one=metrics.pixel_accuracy(self.confusion, many),
            **usage,
            iou=metrics.by_class(self.class_names, metrics.iou(self.confusion, one)),
            matching={name: owner.get(t) for t, name in enumerate(self.class_names)},
        )


def compare(
    network: Module, untrained: Module, by_color: Segmenter, batches: Batches, names: Names
) -> dict:
    """The numbers of the network, and under `untrained` and `rgb_kmeans` those of the baselines."""
    methods = dict(trained=partial(segment, network), untrained=partial(segment, untrained))
    methods["rgb_kmeans"] = by_color
    tallies = {name: Tally(network.prototypes.num_embeddings, names) for name in methods}
    for _, (images, label) in batches:
        for name, segmenter in methods.items():
            tallies[name].add(*segmenter(images), label)
    reports = {name: tally.report() for name, tally in tallies.items()}
    return {**reports.pop("trained"), **reports}


def compare_in_memory(
    network: Module, untrained: Module, images: Tensor, labels: Tensor, names: Names
) -> dict:
    """`compare` of images (b 3 y x) uint8 with labels (b y x)."""
    by_color = rgb_kmeans(sample_pixels([images[:256]]), network.prototypes.num_embeddings)
    batches = [(torch.empty(0), pair) for pair in zip(images.split(64), labels.split(64))]
    return compare(network.eval(), untrained.eval(), by_color, batches, names)


def table(rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Cells as text, right below their headings. rows: name -> one cell per column."""
    first = max(map(len, rows)) + 2
    widths = [2 + max(map(len, column)) for column in zip(columns, *rows.values())]
    lines = []
    for name, cells in {"": columns, **rows}.items():
        texts = (f"{cell:>{width}}" for cell, width in zip(cells, widths))
        lines.append((f"{name:<{first}}" + "".join(texts)).rstrip())
    return "\n".join(lines)


# key -> heading; a table shows those that its report has
COLUMNS = {
    "adjusted_rand_index": "adjusted Rand", "nmi": "NMI", "miou": "mIoU", "accuracy": "acc.",
    "miou_many_to_one": "mIoU n:1", "accuracy_many_to_one": "acc. n:1",
    "occupied_per_image": "occupied", "prototypes_used": "in use",
}  # fmt: skip
EXPLANATION = """\
mIoU, acc. (accuracy): prototypes matched one-to-one with classes. n:1: each
gets its majority class, which favors a large k. occupied: prototypes per
image. in use: in any image."""


def format_table(report: dict) -> str:
    """A report of `compare` as text: one row per method."""
    rows = {"trained": report, "untrained network": report["untrained"]}
    rows["k-means on RGB"] = report["rgb_kmeans"]
    digits = {key: 0 if key == "prototypes_used" else 3 for key in COLUMNS if key in report}
    cells = {name: [f"{row[key]:.{n}f}" for key, n in digits.items()] for name, row in rows.items()}
    text = table(cells, [COLUMNS[key] for key in digits])
    return f"{text}\n{EXPLANATION}" if "miou" in digits else text


def format_classes(report: dict) -> str:
    """The IoU of every class that occurs as text, one per line, and how many do not."""
    lines = [f"  {name:<18}{x:.3f}" for name, x in report["iou"].items() if x is not None]
    without = f"  without a pixel: {len(report['iou']) - len(lines)} classes"
    return "\n".join(["IoU of each class", *lines, without])
