"""The networks inside checkpoints, ours and the released code's, by the sizes of their tensors.

Slide: none.
Paper: none.
Differs: reads the released checkpoints under the names of this repository.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone import ARCHITECTURES, build_backbone
from engine.checkpoint import load_strictly, part, read, some_keys, tensors
from grouping import GroupingNetwork

# name in the released code -> name here. The released `_k` networks are the teacher.
RELEASED_NAMES = (
    (r"^module\.", ""),
    (r"^encoder_q\.", "student.backbone."),
    (r"^encoder_k\.", "teacher.backbone."),
    (r"^projector_q\.", "student.projector."),
    (r"^projector_k\.", "teacher.projector."),
    (r"^grouping_q\.slot_embed\.", "student.prototypes."),
    (r"^grouping_k\.slot_embed\.", "teacher.prototypes."),
    (r"^predictor_slot\.", "predictor."),
)


def import_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the released SlotCon under our names; `center` (1 k) becomes (k).

    state: keys `encoder_q.*` ..., with or without the `module.` of DistributedDataParallel.
    Raises ValueError when it is none.
    """
    ours = {}
    for key, value in state.items():
        for pattern, name in RELEASED_NAMES:
            key = re.sub(pattern, name, key)
        ours[key] = value.reshape(-1) if key == "center" else value
    if not any(key.startswith("student.") for key in ours):
        raise ValueError(
            "not a state dict of the released SlotCon: expected encoder_q.*, found "
            f"{some_keys(state)}"
        )
    return ours


def model_state(contents: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The state dict of SlotCon (student, teacher, predictor, center) in a checkpoint of ours or of
    the release.
    """
    state = contents.get("model", contents)
    state = tensors(state) if isinstance(state, Mapping) else {}
    if any(re.match(r"(module\.)?encoder_q\.", key) for key in state):
        return import_released(state)
    if any(key.startswith("student.") for key in state):
        return state
    try:
        arch = architecture_of(state, path)
    except ValueError:
        raise ValueError(
            f"{path} holds no SlotCon: expected student.* or encoder_q.*, found "
            f"{some_keys(state or contents)}"
        ) from None
    raise ValueError(
        f"{path} is a backbone only ({arch}), without projector and prototypes; give last.pth of "
        "the same run"
    )


def load_network(
    path: str | Path, which: str = "teacher", device: torch.device | str = "cpu"
) -> tuple[GroupingNetwork, dict[str, Any]]:
    """The student's or the teacher's grouping network of a checkpoint, in evaluation mode, and its
    configuration.

    Sizes come from the tensors themselves, the architecture from the configuration that was saved;
    a released checkpoint's from the names and shapes of its tensors. The configuration has at least
    arch, num_prototypes, dim_hidden and dim_out. Raises ValueError with one line for any file that
    does not hold one whole network.
    """
    if which not in ("student", "teacher"):
        raise ValueError(f"a checkpoint holds a student and a teacher, not {which!r}")
    contents = read(path)
    state = part(model_state(contents, path), f"{which}.")
    config = contents.get("config") or contents.get("args")
    config = dict(config) if isinstance(config, Mapping) else {}
    try:
        num_prototypes, dim_out = state["prototypes.weight"].shape
        dim_hidden = len(state["projector.mlp.0.weight"])
    except (KeyError, ValueError):
        raise ValueError(
            f"{path} holds no prototypes or projector of the {which}: found {some_keys(state)}"
        ) from None
    # What was saved is right; shapes are read where nothing was saved, as in released checkpoints.
    arch = (
        config.get("arch")
        if config.get("arch") in ARCHITECTURES
        else architecture_of(part(state, "backbone."), path)
    )
    network = GroupingNetwork(arch, num_prototypes, dim_hidden, dim_out)
    load_strictly(network, state, path)
    config.update(arch=arch, num_prototypes=num_prototypes, dim_hidden=dim_hidden, dim_out=dim_out)
    return network.to(device).eval(), config


def start_from(model: torch.nn.Module, path: str | Path) -> str:
    """Start a new model from given weights: a SlotCon of ours or of the release, or a backbone.

    model: a SlotCon; a backbone goes into student and teacher, of a whole checkpoint everything
    that has the same name and shape. Returns what was used, in one line. Raises ValueError where
    the backbone is not there as a whole.
    """
    contents, own = read(path), model.state_dict()
    try:
        given = model_state(contents, path)
    except ValueError:
        held = contents.get("model", contents)
        held = tensors(held) if isinstance(held, Mapping) else {}
        trunk = {k: v for k, v in held.items() if "fc." not in k}
        both = "student.backbone.", "teacher.backbone."
        given = {prefix + k: v for prefix in both for k, v in trunk.items()}
    used = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    # Files of torch before 0.4.1 have no counts of batches: those of a new model are 0, and stay.
    missing = [
        k for k in own if ".backbone." in k and k not in used and "num_batches_tracked" not in k
    ]
    if missing:
        raise ValueError(
            f"--init {path} does not hold this backbone: {len(missing)} of its tensors are missing "
            f"or of another shape, first {missing[0]}; found {some_keys(given)}"
        )
    model.load_state_dict({**own, **used})
    parts = sorted({key.split(".")[1] if "." in key else key for key in used})
    count = f"{len(used)} of {len(own)} tensors used"
    return f"{path}: {count} ({', '.join(parts)}), the others are random"


def architecture_of(trunk_state: Mapping[str, Tensor], path: str | Path) -> str:
    """The architecture whose parameters have exactly these names and shapes. Raises ValueError if
    there is none.
    """
    shapes = {k: tuple(v.shape) for k, v in trunk_state.items() if not k.startswith("fc.")}
    for arch in ARCHITECTURES:
        with torch.device("meta"):  # names and shapes, no memory
            expected = build_backbone(arch).state_dict()
        if shapes == {k: tuple(v.shape) for k, v in expected.items()}:
            return arch
    raise ValueError(
        f"the backbone in {path} ({len(shapes)} tensors: {some_keys(shapes)} ...) is none of "
        f"{', '.join(ARCHITECTURES)}"
    )


def backbone_state(model: Mapping[str, Tensor], which: str = "teacher") -> dict[str, Tensor]:
    """The trunk alone under torchvision's names: `resnet50().load_state_dict(..., strict=False)`
    misses only fc.*.
    """
    return part(model, f"{which}.backbone.")
