"""Files for other libraries: of timm, or a ResNet under torchvision's or detectron2's names."""

import importlib
import io
import pickle
import re
from collections.abc import Mapping
from types import ModuleType

import torch
import torchvision
from torch import Tensor, nn

from backbone import build_backbone

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


def name_of(name: str, form: str) -> str:
    """A name of torchvision's under torchvision or detectron2."""
    for rule in DETECTRON2_NAMES if form == "detectron2" else ():
        name = re.sub(*rule, name)
    return name


def encoded(state: Mapping[str, Tensor], form: str, suffix: str) -> bytes:
    """A file for the target's checkpointer: of torch, safetensors, or arrays, as detectron2 writes.

    Raises ValueError where safetensors is not installed.
    """
    if form == "detectron2":
        arrays = {name_of(name, form): value.numpy() for name, value in state.items()}
        return pickle.dumps(dict(model=arrays, __author__="SlotCon", matching_heuristics=True))
    if suffix == ".safetensors":
        return safetensors().save({name: value.contiguous() for name, value in state.items()})
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()


def decoded(file: bytes, arch: str, form: str, suffix: str) -> nn.Module:
    """The target's own network with what our file holds: images (1 3 y x) -> its last map, flat."""
    if form == "detectron2":
        named = pickle.loads(file)["model"]
    elif suffix == ".safetensors":
        named = safetensors().load(file)
    else:
        named = torch.load(io.BytesIO(file))
    if form == "timm":
        network = nn.Sequential(build_backbone(arch), nn.Flatten())
        network[0].load_state_dict(named)
        return network.eval()
    network = getattr(torchvision.models, arch)(weights=None)
    network.avgpool = network.fc = nn.Identity()
    names = network.state_dict().keys()
    network.load_state_dict({n: torch.as_tensor(named[name_of(n, form)]) for n in names})
    return network.eval()


def safetensors() -> ModuleType:
    """The library's part for torch. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise ValueError("*.safetensors needs it: pip install safetensors") from None
