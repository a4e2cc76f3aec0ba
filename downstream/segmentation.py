"""Tables 2 and 4, Cityscapes, VOC, ADE20K: mmsegmentation's FCN and views [P], mean IoU."""

import functools
import itertools
import random
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate as collate  # noqa: F401, as detection.collate
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2 import functional as pixels

from downstream.backbones import NEAREST, dilate, fitting, some_of
from downstream.settings import Segmentation
from engine.processes import Place
from engine.ranks import sum_over_ranks
from measures import metrics
from measures.datasets import UNSEEN, Labeled, open_labeled
from photometric import IMAGENET_MEAN, normalize

SCORE = "miou"  # decides which weights are the best
TOY_SCENES = 768  # to learn from
TRIES = 10  # crops until one is varied enough [P: mmsegmentation]
MOST = 0.75  # of the labeled pixels of a crop that one class may have [P]
GRAY = [round(255 * value) for value in IMAGENET_MEAN]  # beside the image: zero once normalized
# Brightness, contrast, saturation, hue: from the range with probability 1/2, else neutral [P]
DISTORTIONS = (((-32, 32), 0), ((0.5, 1.5), 1), ((0.5, 1.5), 1), ((-0.1, 0.1), 0))


def prepare(c: Segmentation, backbone: nn.Module) -> tuple[nn.Module, Labeled, Labeled]:
    """The model, what it learns from, and what it is tested on. Raises ValueError.

    Without classes.txt each part of a folder counts its own ids; the network has those of both.
    """
    parts = [c.train_list if c.dataset == "voc" else "train", "val"][: 1 + (c.test_on == "val")]
    drawn = dict(count=c.labeled or TOY_SCENES, seed=UNSEEN + c.seed) if c.dataset == "toy" else {}
    open_part = functools.partial(open_labeled, c.dataset, c.data_dir)
    opened = [open_part(parts[0], **drawn), *map(open_part, parts[1:])]
    classes = {len(each.class_names) for each in opened}
    if len(classes) > 1:
        opened = [open_part(part, num_classes=max(classes)) for part in parts]
    seen = opened[0].subset(some_of(range(len(opened[0])), c))
    return Segmenter(backbone, max(classes), c), seen, opened[1] if opened[1:] else seen


class FCNHead(nn.Module):
    """3x3 convolutions, then a score per class: map (b c h w) -> scores (b t h w).

    concat: one more convolution joins what they made with the map.
    """

    def __init__(
        self, channels: int, classes: int, width: int, convs: int, dilation: int = 1,
        concat: bool = False, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        pairs = itertools.pairwise((channels, *[width] * convs))
        self.convs = nn.Sequential(*(conv_norm_relu(*pair, dilation) for pair in pairs))
        self.join = conv_norm_relu(channels + width, width) if concat else None
        self.dropout = nn.Dropout2d(dropout)
        self.scores = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.zeros_(self.scores.bias)

    def forward(self, features: Tensor) -> Tensor:
        """features (b c h w) -> scores (b t h w)."""
        x = self.convs(features)
        if self.join is not None:
            x = self.join(torch.cat([features, x], dim=1))  # over c
        return self.scores(self.dropout(x))


def conv_norm_relu(inside: int, outside: int, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution, its batch norm, ReLU; weights start as in mmsegmentation [P]."""
    block = Conv2dNormActivation(inside, outside, 3, dilation=dilation)
    nn.init.kaiming_normal_(block[0].weight, mode="fan_out", nonlinearity="relu")
    return block


class Segmenter(nn.Module):
    """A backbone with an FCN head, and one on C4 where c.aux_weight > 0. Nothing is frozen."""

    def __init__(self, backbone: nn.Module, classes: int, c: Segmentation):
        super().__init__()
        if c.output_stride:
            dilate(backbone, c.output_stride)
        self.c, self.classes = c, classes
        self.backbone, self.aux_head, self.losses = backbone, None, ("loss",)
        channels, sizes = backbone.out_channels, (c.head_width, c.head_convs, c.head_dilation)
        self.head = FCNHead(channels, classes, *sizes, c.head_concat, c.dropout)
        if c.aux_weight:
            if not hasattr(backbone, "layer4"):
                raise ValueError("the auxiliary head needs a ResNet's C4: set --aux-weight 0")
            self.backbone = IntermediateLayerGetter(backbone, {"layer3": "aux", "layer4": "out"})
            self.aux_head = FCNHead(channels // 2, classes, 256, 1, dropout=c.dropout)  # [P]
            self.losses = ("loss", "main_loss", "aux_loss")

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) uint8, labels (b y x) in 0..t-1 or IGNORE -> loss, `losses` (n)."""
        maps = self.backbone(normalize(images))
        if self.aux_head is None:
            loss = pixel_loss(self.head(maps), labels)
            return loss, loss.detach()[None]
        main = pixel_loss(self.head(maps["out"]), labels)
        aux = pixel_loss(self.aux_head(maps["aux"]), labels)
        loss = main + self.c.aux_weight * aux
        return loss, torch.stack([loss, main, aux]).detach()

    def scores(self, images: Tensor) -> Tensor:
        """images (b 3 y x) uint8, or float 0..1 -> scores (b t y x) of every class and pixel."""
        maps = self.backbone(normalize(images))
        scores = self.head(maps if self.aux_head is None else maps["out"])
        return enlarged(scores, images.shape[-2:])

    @torch.inference_mode()
    def predict(self, image: Tensor) -> Tensor:
        """image (3 y x) uint8 -> the class of every pixel (y x) int64; read in the frame."""
        c, batch = self.c, image[None].float() / 255
        if any(c.frame):
            size = fitting(image.shape[-2:], *c.frame)
            batch = F.interpolate(batch, size, mode="bilinear", antialias=True)
        scores = slide(self, batch, *c.window) if any(c.window) else self.scores(batch)
        return enlarged(scores, image.shape[-2:])[0].argmax(0)  # over t


def enlarged(scores: Tensor, size: torch.Size) -> Tensor:
    """scores (b t h w) -> (b t y x) float32 of this size (y, x)."""
    return F.interpolate(scores.float(), size, mode="bilinear", align_corners=False)


def pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scores (b t h w) enlarged to labels (b y x), mean over all pixels, of which
    those without a label count as zero [P: mmsegmentation].
    """
    scores = enlarged(scores, labels.shape[-2:])
    total = F.cross_entropy(scores, labels, ignore_index=metrics.IGNORE, reduction="sum")
    return total / labels.numel()


def slide(network: Segmenter, images: Tensor, window: int, stride: int) -> Tensor:
    """images (b 3 y x) -> scores (b t y x): the mean over all squares that cover a pixel.

    Squares at the lower and right border are moved back into the image [P: mmsegmentation].
    """
    b, _, y, x = images.shape
    sums, counts = images.new_zeros((b, network.classes, y, x)), images.new_zeros((y, x))
    corners = [range(0, max(side - window, 0) + stride, stride) for side in (y, x)]
    for top, left in itertools.product(*corners):
        top, left = min(top, max(y - window, 0)), min(left, max(x - window, 0))
        part = ..., slice(top, top + window), slice(left, left + window)
        sums[part] += network.scores(images[part])
        counts[part] += 1
    return sums / counts


def view(pair: tuple[Tensor, Tensor], rng: random.Random, c: Segmentation) -> tuple[Tensor, Tensor]:
    """What a step sees: a square of the resized image, mirrored half of the time.

    image (3 y x) uint8, label (y x) int64 -> (3 crop crop), (crop crop).
    """
    image, label = pair[0], pair[1][None]
    factor, size = rng.uniform(*c.scale), image.shape[-2:]
    frame = c.frame if any(c.frame) else (max(size), min(size))
    size = fitting(size, *(side * factor for side in frame))
    image, label = pixels.resize(image, size), pixels.resize(label, size, NEAREST)
    sides = [min(side, c.crop) for side in size]
    for _ in range(TRIES):
        corner = [rng.randint(0, whole - side) for whole, side in zip(size, sides)]
        marks = pixels.crop(label, *corner, *sides)
        counts = torch.bincount(marks[marks != metrics.IGNORE])
        if len(counts) and counts.max() < MOST * counts.sum():  # so there are two classes
            break
    image = pixels.crop(image, *corner, *sides)
    if rng.random() < 0.5:
        image, marks = image.flip(-1), marks.flip(-1)  # over x
    if c.distort:
        image = distorted(image, rng)
    beside = [0, 0, c.crop - sides[1], c.crop - sides[0]]  # at the right and below
    return pixels.pad(image, beside, GRAY), pixels.pad(marks, beside, metrics.IGNORE)[0]


def distorted(image: Tensor, rng: random.Random) -> Tensor:
    """Other colors, as mmsegmentation draws them [P]: image (3 y x) uint8 -> the same.

    Contrast comes before or after saturation and hue, by chance. With the saturation of HSV,
    x -> V - (V - x) min(saturation, V / (V - min)), V: the largest color.
    """
    brighter, contrast, saturation, hue = (
        rng.uniform(*ends) if rng.random() < 0.5 else neutral for ends, neutral in DISTORTIONS
    )
    before, after = (contrast, 1) if rng.random() < 0.5 else (1, contrast)
    x = ((image.float() + brighter) / 255).clamp(0, 1)
    x = pixels.adjust_brightness(x, before)  # a factor around black
    value = x.amax(0)  # over color
    limit = value / (value - x.amin(0)).clamp(min=1e-9)
    x = value - (value - x) * limit.clamp(max=saturation)
    x = pixels.adjust_brightness(pixels.adjust_hue(x, hue), after)
    return (255 * x).round().to(torch.uint8)


def scores(
    model: Segmenter, data: Labeled, items: Iterable[tuple[int, Any]], place: Place
) -> dict[str, Any]:
    """miou, accuracy, iou of each class by name, in [0, 1]; items: this rank's `share`."""
    t = len(data.class_names)
    counts = torch.zeros(t, t, dtype=torch.long)
    for _, (image, label) in items:
        found = model.predict(image.to(place.device)).cpu()
        counts += metrics.confusion_matrix(found, label, t, t)
    counts = sum_over_ranks(counts.to(place.device)).cpu()
    return metrics.known_scores(counts, data.class_names)
