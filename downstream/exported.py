"""Files for other libraries: of timm, or a ResNet under torchvision's or detectron2's names."""

import io
import pickle
import re
from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor, nn

from backbone import RESNETS, build_backbone

DETECTRON2_SETTINGS = (  # what a configuration must say for such a file
    'INPUT.FORMAT "RGB"; MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]; '
    "MODEL.PIXEL_STD [58.395, 57.12, 57.375]; MODEL.RESNETS.STRIDE_IN_1X1 False; "
    'MODEL.RESNETS.NORM "SyncBN"; MODEL.BACKBONE.FREEZE_AT 0'
)
DETECTRON2_NAMES = (  # torchvision -> its modeling/backbone/resnet.py, one rule after the other
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def detectron2_name(name: str) -> str:
    """Of a tensor that torchvision calls `name`."""
    for rule in DETECTRON2_NAMES:
        name = re.sub(*rule, name)
    return name


def encoded(state: Mapping[str, Tensor], suffix: str) -> bytes:
    """A file for the target's checkpointer: of torch, safetensors, or *.pkl of detectron2."""
    if suffix == ".pkl":
        arrays = {detectron2_name(name): value.numpy() for name, value in state.items()}
        return pickle.dumps(dict(model=arrays, __author__="SlotCon", matching_heuristics=True))
    if suffix == ".safetensors":
        from safetensors.torch import save  # need not be installed

        return save({name: value.contiguous() for name, value in state.items()})
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()


def decoded(file: bytes, arch: str, suffix: str) -> nn.Module:
    """The target's own network with what our file holds: images (1 3 y x) -> its last map, flat."""
    if arch in RESNETS:
        network = whole = getattr(torchvision.models, arch)(weights=None)
        network.avgpool = network.fc = nn.Identity()
    else:
        network = build_backbone(arch)
        whole = nn.Sequential(network, nn.Flatten())
    if suffix == ".pkl":
        arrays, names = pickle.loads(file)["model"], network.state_dict().keys()
        named = {name: torch.as_tensor(arrays[detectron2_name(name)]) for name in names}
    elif suffix == ".safetensors":
        from safetensors.torch import load

        named = load(file)
    else:
        named = torch.load(io.BytesIO(file))
    network.load_state_dict(named)
    return whole.eval()
