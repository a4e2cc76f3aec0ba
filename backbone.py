"""Images become pixel embeddings: a convolutional trunk, then a projector of 1x1 convolutions.

Slide: "Together: solving segmentation & representation jointly" (the shared pixel embedding
function).
Paper: section 3.1 and the architecture paragraph of the experiments.
Differs: nothing known for the ResNets, which are torchvision's, key by key. `tiny` and
`small` are [U]: trunks for toy images and for small photographs.
Read next: grouping.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

# name -> (residual block, blocks per stage), as in torchvision.models.
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
ARCHITECTURES = ("tiny", "small", *RESNETS)


def build_trunk(arch: str) -> nn.Module:
    """A convolutional trunk with random weights: images (b 3 y x) -> feature map (b c h w).

    arch: one of `ARCHITECTURES`. The result has `out_channels` (c) and `stride` (y / h).
    Raises ValueError for an unknown name.
    """
    if arch == "tiny":
        return TinyTrunk()
    if arch == "small":
        return SmallTrunk()
    if arch in RESNETS:
        return ResNetTrunk(*RESNETS[arch])
    raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}")


class ResNetTrunk(TorchvisionResNet):
    """torchvision's ResNet up to C5, the last map before pooling: stride 32, no classifier.

    The last batch norm of every residual block starts at zero [O], so that each block starts as the
    identity. Its state dict is torchvision's without `fc.*`.
    """

    stride = 32

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: tuple[int, ...]):
        super().__init__(block, list(layers), zero_init_residual=True)
        self.out_channels = self.fc.in_features
        del self.avgpool, self.fc

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> C5 map (b c h w)."""
        c1 = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(c1)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return self.layer4(c4)


class TinyTrunk(nn.Sequential):
    """A texture is the mean of what filters answer: a trunk for toy images of about 64 px, with
    output stride 4 and a receptive field of 17 px [U].

    Three 3x3 convolutions look for small patterns. The first keeps the full resolution, where fine
    textures still can be told apart. The mean over 3x3 cells covers the period of a texture:
    without it a cell says where in the period it lies, on a crest or in a trough. Both views agree
    about that, so crests and troughs would become prototypes. The norm over the channels takes away
    how strong the texture is, or all strong textures would become one group.

    A field as wide as the image would give one prototype per image. Zero padding would tell every
    pixel how far it is from the border, so that prototypes become places; hence reflect padding.
    """

    stride = 4

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 96),
        strides: tuple[int, ...] = (1, 2, 2),
        out: int = 64,
    ):
        layers, channels = [], 3
        for width, stride in zip(widths, strides):
            conv = reflected_conv(channels, width, stride)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        super().__init__(
            *layers,
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            LayerNorm2d(channels),
            reflected_conv(channels, out, size=1),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )
        self.out_channels = out


class SmallTrunk(nn.Sequential):
    """A small ResNet for small photographs: output stride 8, receptive field 71 px [U].

    A stem of one 3x3 convolution, then residual blocks. A ResNet's stride of 32 leaves 4 x 4 cells
    of a view of 128 px, too coarse to group; the field of the tiny trunk sees texture only. The
    padding reflects, since zeros tell a pixel how far it is from the border.
    """

    def __init__(
        self,
        stem: tuple[int, int] = (32, 2),
        widths: tuple[int, ...] = (48, 96, 192),
        strides: tuple[int, ...] = (2, 2, 1),
    ):
        channels, stride = stem
        norm = nn.BatchNorm2d(channels)
        layers = [reflected_conv(3, channels, stride), norm, nn.ReLU(inplace=True)]
        for width, step in zip(widths, strides):
            layers.append(SmallBlock(channels, width, step))
            channels, stride = width, stride * step
        super().__init__(*layers)
        self.out_channels, self.stride = channels, stride


class SmallBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, whose stride is an average over the cells [U]."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            reflected_conv(in_channels, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            reflected_conv(width, width),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))
        if in_channels != width:
            self.shortcut.append(nn.Conv2d(in_channels, width, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        """maps (b c h w) -> (b c' h' w'), h' = h / stride, rounded up."""
        return self.relu(self.residual(maps) + self.shortcut(maps))


def reflected_conv(in_channels: int, width: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    """A convolution of 3x3 or 1x1 with reflect padding, no bias, and a ResNet's random weights."""
    conv = nn.Conv2d(
        in_channels, width, size, stride, padding=size // 2, padding_mode="reflect", bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Projector(nn.Module):
    """Three 1x1 convolutions c -> dim_hidden -> dim_hidden -> dim_out: feature map (b c h w) ->
    embeddings (b d h w).

    Batch norm and exact GELU after the first two, nothing after the last, biases everywhere [O].
    Weights start from a normal of std 0.02 truncated at +-2 [O], which at this width cuts nothing;
    biases start at 0.
    """

    def __init__(self, in_channels: int, dim_hidden: int, dim_out: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(in_channels, dim_hidden, 1),
            nn.BatchNorm2d(dim_hidden),
            nn.GELU(),
            nn.Conv2d(dim_hidden, dim_hidden, 1),
            nn.BatchNorm2d(dim_hidden),
            nn.GELU(),
            nn.Conv2d(dim_hidden, dim_out, 1),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """features (b c h w) -> pixel embeddings (b d h w), not normalized."""
        return self.mlp(features)
