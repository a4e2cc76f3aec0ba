"""Fully convolutional networks for semantic segmentation: a trunk, a head, and how a whole image is
read.

Slides: tables 2 and 4 (Cityscapes, VOC, ADE20K). Paper: section 4.2.
Differs: torchvision's own FCN head is another one. Strides, widths and dilations are those of the
released settings [O], layers and loss those of mmsegmentation [P].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.trunks import dilate, stages
from measures.metrics import IGNORE
from photometric import normalize


class FCNHead(nn.Module):
    """Convolutions 3x3 with batch norm, then one score per class: map (b c h w) -> scores (b t h
    w).

    concat: the input is put beside what they made, and one more convolution joins the two. dropout:
    of whole channels, before the scores. Weights start as mmsegmentation's: Kaiming for 3x3, normal
    of std 0.01 for scores.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int,
        convs: int = 2,
        dilation: int = 1,
        concat: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = (in_channels, *[width] * convs)
        self.convs = nn.Sequential(
            *(conv_norm_relu(a, b, dilation) for a, b in itertools.pairwise(widths))
        )
        self.join = conv_norm_relu(in_channels + width, width) if concat else None
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
    """A 3x3 convolution of equal resolution, its batch norm, ReLU."""
    conv = nn.Conv2d(inside, outside, 3, padding=dilation, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class Segmenter(nn.Module):
    """A trunk with an FCN head, and an auxiliary head on C4 where aux_weight > 0.

    trunk: of `backbone.build_backbone`; output_stride: 8 or 16 of a ResNet, 0 leaves the trunk as it
    is; width, convs, dilation, concat, dropout: of the head. Nothing is frozen. Raises ValueError
    for what a trunk has not.
    """

    def __init__(
        self,
        trunk: nn.Module,
        classes: int,
        output_stride: int = 16,
        width: int = 256,
        convs: int = 2,
        dilation: int = 6,
        concat: bool = False,
        dropout: float = 0.0,
        aux_weight: float = 0.0,
    ):
        super().__init__()
        if output_stride:
            if not hasattr(trunk, "layer4"):
                raise ValueError(
                    f"only a ResNet can be given another output stride: set --output-stride 0 for "
                    f"this trunk, whose own is {trunk.stride}"
                )
            dilate(trunk, output_stride)
        self.classes, self.output_stride, self.aux_weight = classes, trunk.stride, aux_weight
        self.backbone = stages(trunk, aux=aux_weight > 0)
        self.head = FCNHead(trunk.out_channels, classes, width, convs, dilation, concat, dropout)
        # One convolution on C4, of half the channels of C5 [P: mmsegmentation's auxiliary FCNHead].
        self.aux_head = (
            FCNHead(trunk.out_channels // 2, classes, 256, 1, dropout=dropout)
            if aux_weight
            else None
        )

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of what `forward` reports."""
        return ("loss",) if self.aux_head is None else ("loss", "main_loss", "aux_loss")

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) uint8, labels (b y x) in 0..t-1 or IGNORE -> loss, `losses` (n)."""
        maps = self.backbone(normalize(images))
        main = pixel_loss(self.head(maps["out"]), labels)
        if self.aux_head is None:
            return main, main.detach()[None]
        aux = pixel_loss(self.aux_head(maps["aux"]), labels)
        loss = main + self.aux_weight * aux
        return loss, torch.stack([loss, main, aux]).detach()

    def scores(self, images: Tensor) -> Tensor:
        """images (b 3 y x) uint8, or float 0..1 -> scores (b t y x) of every class at every
        pixel."""
        scores = self.head(self.backbone(normalize(images))["out"]).float()
        return F.interpolate(scores, images.shape[-2:], mode="bilinear", align_corners=False)


def pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scores (b t h w) enlarged to labels (b y x), mean over all pixels of the
    batch.

    A pixel without a label counts as zero [P: mmsegmentation], so that the mean has one meaning on
    every rank, and a crop without any label is no division by zero.
    """
    scores = F.interpolate(scores.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


@torch.inference_mode()
def predict(
    network: Segmenter, image: Tensor, scale: Sequence[int] = (), window: int = 0, stride: int = 0
) -> Tensor:
    """The class of every pixel of one image (3 y x) uint8 -> (y x) int64, at the image's own size.

    scale: (long side, short side) px that the image is resized to fit into first, () for its own
    size; window, stride: px of the square that slides over it, window 0: the whole image at once.
    """
    size = image.shape[-2:]
    batch = image[None].float() / 255
    if scale:
        batch = F.interpolate(batch, fitting(size, *scale), mode="bilinear", antialias=True)
    scores = slide(network, batch, window, stride) if window else network.scores(batch)
    scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores[0].argmax(0)  # over t


def slide(network: Segmenter, images: Tensor, window: int, stride: int) -> Tensor:
    """images (b 3 y x) of `scores` -> scores (b t y x): the mean over all squares that cover a
    pixel.

    Squares at the lower and right border are moved back into the image [P: mmsegmentation]; an
    image that is smaller than a square is read at once in that direction.
    """
    b, _, y, x = images.shape
    sums = images.new_zeros((b, network.classes, y, x), dtype=torch.float32)
    counts = images.new_zeros((y, x), dtype=torch.float32)
    for top in places(y, window, stride):
        for left in places(x, window, stride):
            part = slice(top, top + window), slice(left, left + window)
            sums[..., part[0], part[1]] += network.scores(images[..., part[0], part[1]])
            counts[part] += 1
    return sums / counts


def places(length: int, window: int, stride: int) -> list[int]:
    """Where squares begin along a side of so many px: every `stride`, the last one flush with the
    end."""
    last = max(length - window, 0)
    return [min(place, last) for place in range(0, last + stride, stride)]


def fitting(size: Sequence[int], long: int, short: int) -> tuple[int, int]:
    """The size (y, x) px, of the same shape, that fits into a frame of these sides either way
    round."""
    factor = min(long / max(size), short / min(size))
    return tuple(max(1, int(side * factor + 0.5)) for side in size)
