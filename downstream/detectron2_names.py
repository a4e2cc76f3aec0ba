"""A ResNet under detectron2's names: the two-way table, and a network with those names to prove a
file with.

Slide: table 2 (transfer to COCO). Paper: section 4.2, which fine-tuned with detectron2.
Differs: detectron2 itself no longer installs on today's torch, so its names stand here; they are
those of detectron2/modeling/backbone/resnet.py, where every convolution holds its norm.

What a detectron2 configuration must say for these weights: MODEL.RESNETS.STRIDE_IN_1X1 False,
MODEL.RESNETS.NORM "SyncBN", MODEL.BACKBONE.FREEZE_AT 0, INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN and
MODEL.PIXEL_STD as in SETTINGS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

SETTINGS = (
    'INPUT.FORMAT "RGB"',
    "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]",
    "MODEL.PIXEL_STD [58.395, 57.12, 57.375]",
    "MODEL.RESNETS.STRIDE_IN_1X1 False",
    'MODEL.RESNETS.NORM "SyncBN"',
    "MODEL.BACKBONE.FREEZE_AT 0",
)

TABLE = (  # torchvision -> detectron2
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.(\d+)\.bn(\d)\.", lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm."),
    (r"^layer(\d)\.(\d+)\.downsample\.0\.", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut."),
    (r"^layer(\d)\.(\d+)\.downsample\.1\.", lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.norm."),
    (r"^layer(\d)\.(\d+)\.", lambda m: f"res{int(m[1]) + 1}.{m[2]}."),
)
BACK = (  # detectron2 -> torchvision
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}."),
    (r"^res(\d)\.(\d+)\.shortcut\.norm\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}.downsample.1."),
    (r"^res(\d)\.(\d+)\.shortcut\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}.downsample.0."),
    (r"^res(\d)\.(\d+)\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}."),
)


def rename(state: Mapping[str, Tensor], table: Sequence) -> dict[str, Tensor]:
    """The first rule that fits a name renames it; names that no rule fits stay."""
    renamed = {}
    for name, value in state.items():
        rule = next((rule for rule in table if re.match(rule[0], name)), None)
        renamed[re.sub(*rule, name) if rule else name] = value
    return renamed


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's state under torchvision's names -> under detectron2's."""
    return rename(state, TABLE)


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's state under detectron2's names -> under torchvision's."""
    return rename(state, BACK)


# ------------------------------------------------------------------------ to prove a file with


class Conv(nn.Conv2d):
    """A convolution that holds its norm."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int):
        super().__init__(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        """x (b c h w) -> normalized (b c h w)."""
        return self.norm(super().forward(x))


class Block(nn.Module):
    """A residual block of two 3x3 convolutions (kernels 3, 3) or a bottleneck of three (1, 3,
    1)."""

    def __init__(self, widths: Sequence[int], kernels: Sequence[int], stride: int):
        super().__init__()
        inside, outside, self.count = widths[0], widths[-1], len(kernels)
        strided = kernels.index(3)  # not the 1x1 before it: STRIDE_IN_1X1 False
        for i, kernel in enumerate(kernels):
            conv = Conv(widths[i], widths[i + 1], kernel, stride if i == strided else 1)
            self.add_module(f"conv{i + 1}", conv)
        self.shortcut = (
            Conv(inside, outside, 1, stride) if inside != outside or stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (b c h w) -> (b c h w), at the block's stride."""
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"conv{i}")(y)
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """A ResNet under detectron2's names: images (b 3 y x) normalized -> res5 (b c h w).

    blocks: per stage; bottleneck: as in ResNet-50 and deeper.
    """

    def __init__(self, blocks: Sequence[int], bottleneck: bool):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Conv(3, 64, 7, 2)
        inside = 64
        for stage, count in enumerate(blocks):
            width, layers = 64 * 2**stage, []
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                widths = (inside, width, width, 4 * width) if bottleneck else (inside, width, width)
                layers.append(Block(widths, (1, 3, 1) if bottleneck else (3, 3), stride))
                inside = widths[-1]
            self.add_module(f"res{stage + 2}", nn.Sequential(*layers))

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> res5 (b c h w)."""
        x = F.max_pool2d(F.relu(self.stem.conv1(images)), 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x))))
