"""Images become pixel embeddings: a convolutional backbone, then a projector of 1x1 convolutions.

Slide: "Together: solving segmentation & representation jointly" (pixel embedding function).
Paper: section 3.1 and the architecture paragraph of the experiments.
Read next: grouping.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.convnext import LayerNorm2d

from engine import timm_networks


class ResNet(resnet.ResNet):
    """torchvision's ResNet up to C5, stride 32; the same names of tensors, without `fc.*`.

    The last batch norm of a residual block starts at zero [O]: the block starts as the identity.
    """

    stride = 32

    def __init__(self, block: type[nn.Module], layers: tuple[int, ...]):
        super().__init__(block, list(layers), zero_init_residual=True)
        self.out_channels = self.fc.in_features
        del self.avgpool, self.fc

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> C5 map (b c h w)."""
        c1 = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(c1))))


class TinyBackbone(nn.Sequential):
    """For toy images of about 64 px: output stride 4, receptive field 17 px [U].

    The mean over 3x3 cells covers the period of a texture: without it crests and troughs would
    become prototypes. Without the layer norm all strong textures would become one group.
    """

    stride, out_channels = 4, 64

    def __init__(self) -> None:
        super().__init__(
            *convolution(3, 16),
            *convolution(16, 32, stride=2),
            *convolution(32, 96, stride=2),
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            LayerNorm2d(96),
            *convolution(96, 64, size=1),
        )


class SmallBackbone(nn.Sequential):
    """A ResNet for small photographs: output stride 8, receptive field 71 px [U]."""

    stride, out_channels = 8, 192

    def __init__(self) -> None:
        stem = convolution(3, 32, stride=2)
        blocks = SmallBlock(32, 48, 2), SmallBlock(48, 96, 2), SmallBlock(96, 192, 1)
        super().__init__(*stem, *blocks)


class SmallBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, whose stride is an average over the cells [U]."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        convolutions = convolution(in_channels, width, stride) + convolution(width, width)
        self.residual = nn.Sequential(*convolutions[:-1])
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        widen = [nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.shortcut = nn.Sequential(*([pool, *widen] if stride > 1 else widen))

    def forward(self, maps: Tensor) -> Tensor:
        """maps (b c h w) -> (b c' h' w'), h' = h / stride, rounded up."""
        return (self.residual(maps) + self.shortcut(maps)).relu_()


def convolution(channels: int, width: int, stride: int = 1, size: int = 3) -> list[nn.Module]:
    """With batch norm and ReLU. Its padding reflects, since zeros would tell a pixel its place."""
    conv = nn.Conv2d(channels, width, size, stride, size // 2, bias=False, padding_mode="reflect")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


TIMM = "timm:"  # an architecture of this beginning is timm's, by its name there

# name -> (residual block, blocks per stage), as in torchvision.models.
RESNETS = {
    "resnet18": (resnet.BasicBlock, (2, 2, 2, 2)),
    "resnet34": (resnet.BasicBlock, (3, 4, 6, 3)),
    "resnet50": (resnet.Bottleneck, (3, 4, 6, 3)),
    "resnet101": (resnet.Bottleneck, (3, 4, 23, 3)),
}
# name -> constructor. A new backbone is one row; it maps (b 3 y x) to (b c h w) and has
# `out_channels` (c) and `stride` (y / h).
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "tiny": TinyBackbone,
    "small": SmallBackbone,
    **{name: partial(ResNet, *row) for name, row in RESNETS.items()},
}


def build_backbone(arch: str, pretrained: bool = False) -> nn.Module:
    """A backbone of `ARCHITECTURES` with random weights, or timm:NAME, which may be pretrained.

    Raises ValueError for an unknown name, and where timm or its weights are not there.
    """
    if arch.startswith(TIMM):
        return timm_networks.build(arch.removeprefix(TIMM), pretrained)
    if arch not in ARCHITECTURES:
        known = f"{', '.join(ARCHITECTURES)}, or {TIMM}NAME"
        raise ValueError(f"unknown architecture {arch!r}: choose one of {known}")
    if pretrained:
        raise ValueError(f"--pretrained is for --arch {TIMM}NAME; give {arch} weights by --init")
    return ARCHITECTURES[arch]()


def architecture_of(state: Mapping[str, Tensor]) -> str:
    """The architecture with these names and shapes, without `fc.*`. ValueError if there is none."""
    shapes = {name: value.shape for name, value in state.items() if not name.startswith("fc.")}
    for arch in ARCHITECTURES:
        with torch.device("meta"):  # names and shapes, no memory
            expected = build_backbone(arch).state_dict()
        if shapes == {name: value.shape for name, value in expected.items()}:
            return arch
    some = ", ".join([*shapes][:3])
    raise ValueError(f"{len(shapes)} tensors ({some} ...) are none of {', '.join(ARCHITECTURES)}")


class Projector(nn.Module):
    """Three 1x1 convolutions: feature map (b c h w) -> pixel embeddings (b d h w)."""

    def __init__(self, in_channels: int, dim_hidden: int, dim_out: int):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=1)
        self.mlp = three_layers(conv, nn.BatchNorm2d, (in_channels, dim_hidden, dim_out))

    def forward(self, features: Tensor) -> Tensor:
        """features (b c h w) -> pixel embeddings (b d h w), not normalized."""
        return self.mlp(features)


def three_layers(layer: Callable, norm: Callable, dims: tuple[int, int, int]) -> nn.Sequential:
    """dims: in, hidden, out; batch norm and exact GELU after the first two layers [O].

    Weights start from a normal of std 0.02 truncated at +-2, biases at 0 [O].
    """
    dim_in, w, dim_out = dims
    first, second, last = layer(dim_in, w), layer(w, w), layer(w, dim_out)
    for each in (first, second, last):
        nn.init.trunc_normal_(each.weight, std=0.02)
        nn.init.zeros_(each.bias)
    return nn.Sequential(first, norm(w), nn.GELU(), second, norm(w), nn.GELU(), last)
