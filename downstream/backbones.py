"""What both tasks begin with: the pretrained backbone, made ready, and labeled images to read."""

import dataclasses
import functools
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.transforms.v2 import InterpolationMode

from backbone import TIMM, build_backbone
from downstream.settings import Shared
from engine.batches import load
from engine.guards import Paused
from engine.images import BadImage
from engine.log import progress
from engine.processes import Place
from engine.ranks import gather_objects
from measures.networks import open_backbone

NEAREST = InterpolationMode.NEAREST_EXACT  # the pixel under the center, as Pillow's


def open_pretrained(c: Shared, given: set[str]) -> tuple[nn.Module, Shared, str]:
    """The backbone to fine-tune, never loaded in part, the settings for it, and a line about it.

    given: names of the options on the command line. Raises ValueError.
    """
    if c.backbone == "random":
        backbone, arch, source = build_backbone(c.arch), c.arch, "random weights, none loaded"
    else:
        named = c.arch if c.arch.startswith(TIMM) else ""
        backbone, config = open_backbone(c.backbone, c.network, arch=named)
        arch, count = config["arch"], len(backbone.state_dict())
        source = f"all {count} tensors from {config['source']}"
    if "arch" in given and c.arch != arch:
        raise ValueError(f"--arch {c.arch}, but {c.backbone} holds a {arch}: leave --arch out")
    more = dict(arch=arch)
    if not hasattr(backbone, "layer4") and "output_stride" not in given and c.task != "detection":
        more["output_stride"] = 0  # only a ResNet can be given another one
    return backbone, dataclasses.replace(c, **more), f"{arch}, {source}"


def dilate(backbone: nn.Module, output_stride: int) -> None:
    """A ResNet of stride 32 becomes one of stride 16 or 8: its last stages keep the resolution.

    Their 3x3 convolutions look further instead; the first block of a stage has the dilation of the
    stage before [P: mmsegmentation's contract_dilation]. Raises ValueError for other backbones.
    """
    if not hasattr(backbone, "layer4"):
        raise ValueError("only a ResNet can have another stride: set --output-stride 0")
    stages, dilation = (backbone.layer3, backbone.layer4), 1
    for stage in stages[{8: 0, 16: 1, 32: 2}[output_stride] :]:
        for index, block in enumerate(stage):
            dilation *= 1 + (index == 1)
            for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
    backbone.stride = output_stride


def groups_of(model: nn.Module, c: Shared) -> list[dict[str, Any]]:
    """All parameters, for the optimizer: with decay, and in detection norms without it [O]."""
    norms = (m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)))
    free = {p for m in norms for p in m.parameters()} if c.task == "detection" else set()
    return [
        dict(params=[p for p in model.parameters() if (p in free) == is_free], weight_decay=decay)
        for is_free, decay in ((False, c.weight_decay), (True, 0.0))
    ]


def view(of: Callable, seen: Sequence[Any], c: Shared, index: int, rng: random.Random) -> Any:
    """What a step sees, by `of`, of a labeled image. Raises BadImage where it cannot be used."""
    try:
        return of(seen[index], rng, c)
    except ValueError as error:
        raise BadImage(f"labeled image {index}", str(error)) from None


def some_of(every: Sequence[int], c: Shared) -> list[int]:
    """A random --labeled of these, in order, chosen by the seed; 0: all. Raises ValueError."""
    if c.labeled > len(every):
        raise ValueError(f"--labeled {c.labeled}, but there are {len(every)} labeled images")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(c.seed))
    return [every[i] for i in sorted(order[: c.labeled or len(every)].tolist())]


def fitting(size: Sequence[int], long: float, short: float) -> list[int]:
    """The size (y, x) px, of the same shape, that fits into a frame either way round."""
    factor = min(long / max(size), short / min(size))
    return [max(1, int(side * factor + 0.5)) for side in size]


def share(
    data: Sequence[Any], place: Place, workers: int, stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, Any]]:
    """This rank's items with their indices. Raises ValueError for one that cannot be used, and
    Paused at the end of all ranks' shares where one was `stopped`, which ends its share.
    """
    mine = range(place.rank, len(data), place.world_size)
    items = load(functools.partial(operator.getitem, data), mine, workers, stopped)
    try:
        for item, index in zip(progress(items, len(mine), "test"), mine):
            yield index, item
    except ValueError as error:
        raise ValueError(f"the images to test cannot be used: {error}") from None
    if any(gather_objects(stopped())):
        raise Paused
