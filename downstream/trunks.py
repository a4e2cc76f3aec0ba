"""The pretrained trunk in a file, whatever kind of checkpoint it is, and the trunk made ready for
dense tasks.

Slides: tables 2, 3, 4 and 7 (transfer). Paper: section 4.2.
Differs: nothing is ever loaded in part: a wrong key would leave some of the trunk random, and the
number at the end would not say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from backbone import ARCHITECTURES, build_backbone
from downstream import detectron2_names
from engine import checkpoint
from engine.weights import architecture_of, model_state


class TrunkFile(NamedTuple):
    """What a file holds: the architecture, its state under torchvision's names, and what kind of
    file it is."""

    arch: str
    state: dict[str, Tensor]
    kind: str


def read_trunk(path: str | Path, network: str = "teacher") -> TrunkFile:
    """The trunk in a checkpoint: ours (finished or paused, or the folder of its run), the released
    code's, backbone.pth, or an exported file.

    network: teacher or student, where the file holds both. A classifier `fc.*` is no part of a
    trunk; counts of batches that a file lacks are 0. Raises ValueError with one line: no
    checkpoint, or not exactly the tensors of one architecture.
    """
    contents = checkpoint.read(path)
    state = contents.get("model", contents)
    state = checkpoint.tensors(state) if isinstance(state, Mapping) else {}
    config = contents.get("config") or contents.get("args")
    arch = config.get("arch") if isinstance(config, Mapping) else None
    if any(re.match(r"student\.|(module\.)?encoder_q\.", key) for key in state):
        kind = f"{network} of a SlotCon checkpoint"
        state = checkpoint.part(model_state(contents, path), f"{network}.backbone.")
    elif any(key.startswith("stem.") for key in state):
        kind, state = "trunk under detectron2's names", detectron2_names.to_torchvision(state)
    else:
        kind, state = "trunk under torchvision's names", without_classifier(state)
    counts = lacking_counts(state)
    if counts:
        kind += f", {len(counts)} counts of batches set to 0"
        state = {**state, **counts}
    if arch not in ARCHITECTURES:
        arch = architecture_of(state, path) if exact(state) else nearest(state, path)
    with torch.device("meta"):  # names and shapes, no memory
        refuse_differences(build_backbone(arch), state, path)
    return TrunkFile(arch, state, kind)


def lacking_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """num_batches_tracked () = 0 for each norm without it, as in files of torch before 0.4.1.

    No result depends on it: the running means of our trunks move by a fixed momentum.
    """
    names = (re.sub(r"\.running_(mean|var)$", ".num_batches_tracked", name) for name in state)
    return {name: torch.tensor(0) for name in names if name not in state}


def without_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left when torchvision's last layer is taken away."""
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def common(arch: str, state: Mapping[str, Tensor]) -> int:
    """How many tensors of the state the architecture has too, in name and shape."""
    with torch.device("meta"):
        own = build_backbone(arch).state_dict()
    return sum(name in own and own[name].shape == value.shape for name, value in state.items())


def exact(state: Mapping[str, Tensor]) -> bool:
    """Whether the state is one architecture's, tensor by tensor."""
    with torch.device("meta"):
        return any(
            common(arch, state) == len(state) == len(build_backbone(arch).state_dict())
            for arch in ARCHITECTURES
        )


def nearest(state: Mapping[str, Tensor], path: str | Path) -> str:
    """The architecture of which a damaged state is most, so that the complaint can name what
    differs.

    Raises ValueError where it is less than half of any.
    """
    best = max(ARCHITECTURES, key=lambda arch: common(arch, state))
    return best if 2 * common(best, state) > len(state) else architecture_of(state, path)


def refuse_differences(trunk: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError, with the first of them, if any tensor is missing, unexpected or of another
    shape."""
    empty = {name: value.to("meta") for name, value in state.items()}
    checkpoint.load_strictly(trunk, empty, path)


def open_trunk(backbone: str, arch: str, network: str = "teacher") -> tuple[nn.Module, str, str]:
    """The trunk to fine-tune, its architecture, and a line that says how many tensors were used.

    backbone: a file of `read_trunk`, or "random"; arch: of a random one; "" takes the file's own.
    Raises ValueError.
    """
    if backbone == "random":
        return build_backbone(arch), arch, f"{arch} with random weights, none loaded"
    found = read_trunk(backbone, network)
    if arch not in ("", found.arch):
        raise ValueError(f"--arch {arch}, but {backbone} holds a {found.arch}: leave --arch out")
    trunk = build_backbone(found.arch)
    checkpoint.load_strictly(trunk, found.state, backbone)
    count = f"{len(found.state)} of {len(trunk.state_dict())} tensors"
    about = f"{found.arch}, {count} from {backbone} ({found.kind}), none missing, none left over"
    return trunk, found.arch, about


# ------------------------------------------------------------------------ for dense tasks


def dilate(trunk: nn.Module, output_stride: int) -> None:
    """A ResNet of stride 32 becomes one of stride 16 or 8: its last stages keep the resolution of
    what they get.

    Their 3x3 convolutions look `dilation` pixels further instead; the first block of a stage has
    the dilation of the stage before, as in torchvision [P: mmsegmentation's contract_dilation]. No
    weight changes. Raises ValueError for other strides.
    """
    stages = {32: (), 16: (trunk.layer4,), 8: (trunk.layer3, trunk.layer4)}
    if output_stride not in stages:
        raise ValueError(f"a ResNet has output stride 8, 16 or 32, not {output_stride}")
    dilation = 1
    for stage in stages[output_stride]:
        for index, block in enumerate(stage):
            if index == 1:
                dilation *= 2
            for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
    trunk.stride = output_stride


def stages(trunk: nn.Module, aux: bool) -> nn.Module:
    """What heads ask for: images (b 3 y x) -> {"out": (b c h w)}, and with aux {"aux": (b c h w)},
    a ResNet's C4.

    A ResNet's state keeps its own names: it fits
    `torchvision.models.segmentation.fcn_resnet50().backbone`. Raises ValueError where a C4 is
    wanted of a trunk that has none.
    """
    if hasattr(trunk, "layer4"):
        wanted = {"layer3": "aux", "layer4": "out"} if aux else {"layer4": "out"}
        return IntermediateLayerGetter(trunk, wanted)
    if aux:
        raise ValueError(
            "the auxiliary head needs a ResNet's C4: set --aux-weight 0 for this trunk"
        )
    return OneStage(trunk)


class OneStage(nn.Module):
    """A trunk without stages: images (b 3 y x) -> {"out": (b c h w)}."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images (b 3 y x) normalized -> {"out": (b c h w)}."""
        return {"out": self.trunk(images)}
