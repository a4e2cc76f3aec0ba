"""Files for other libraries: a ResNet under the names of torchvision or of detectron2, whose
modeling/backbone/resnet.py has every norm inside its convolution.
"""

import io
import pickle
import re
from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor, nn

DETECTRON2_SETTINGS = (  # what a configuration must say for such a file
    'INPUT.FORMAT "RGB"; MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]; '
    "MODEL.PIXEL_STD [58.395, 57.12, 57.375]; MODEL.RESNETS.STRIDE_IN_1X1 False; "
    'MODEL.RESNETS.NORM "SyncBN"; MODEL.BACKBONE.FREEZE_AT 0'
)
DETECTRON2_NAMES = (  # torchvision -> detectron2, one rule after the other
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


def encoded(state: Mapping[str, Tensor], form: str, arrays: bool) -> bytes:
    """A file for the target's checkpointer; arrays: as detectron2 writes *.pkl."""
    contents = {name_of(n, form): v.numpy() if arrays else v for n, v in state.items()}
    if form == "detectron2":
        contents = dict(model=contents, __author__="SlotCon", matching_heuristics=True)
    if arrays:
        return pickle.dumps(contents)
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def decoded(file: bytes, arch: str, form: str, arrays: bool) -> nn.Module:
    """torchvision's own network with what our file holds: images (1 3 y x) -> C5, flat."""
    contents = pickle.loads(file) if arrays else torch.load(io.BytesIO(file))
    named = contents["model"] if form == "detectron2" else contents
    network = getattr(torchvision.models, arch)(weights=None)
    network.avgpool = network.fc = nn.Identity()
    names = network.state_dict().keys()
    network.load_state_dict({n: torch.as_tensor(named[name_of(n, form)]) for n in names})
    return network.eval()
