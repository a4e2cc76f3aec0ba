"""The networks that are measured: read from a checkpoint, or random for comparison.

Slide: none.
Paper: none.
Differs: ours [U].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbone import build_backbone
from engine import checkpoint, weights
from grouping import GroupingNetwork


def open_network(
    path: Path, which: str, device: torch.device | str
) -> tuple[GroupingNetwork, dict[str, Any]]:
    """The student's or the teacher's grouping network, for evaluation, and its configuration.

    Raises ValueError with one line; for a backbone, the line names what can be measured.
    """
    try:
        return weights.load_network(path, which, device)
    except ValueError:
        arch = arch_of_backbone(path)
        if arch is None:
            raise
    raise ValueError(f"{path} is a backbone only ({arch}): without projector and prototypes it has "
                     "no groups and no slots; give last.pth of the same run, or measure its "
                     "features with evaluate.py probe")


def open_trunk(
    path: Path, which: str, device: torch.device | str
) -> tuple[nn.Module, dict[str, Any]]:
    """The trunk of a checkpoint or of a backbone.pth (torchvision's names), and its configuration.

    The second value has at least arch. Raises ValueError with one line.
    """
    arch = arch_of_backbone(path)
    if arch is None:
        network, config = weights.load_network(path, which, device)
        return network.backbone, config
    if which != "teacher":
        raise ValueError(f"{path} is one backbone only ({arch}), so there is no {which} in it")
    trunk = build_backbone(arch)
    state = checkpoint.tensors(checkpoint.read(path))
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    checkpoint.load_strictly(trunk, state, path)
    return trunk.to(device).eval(), dict(arch=arch)


def arch_of_backbone(path: Path) -> str | None:
    """The architecture of a file that holds one trunk and no more; None for any other file."""
    try:
        return weights.architecture_of(checkpoint.tensors(checkpoint.read(path)), path)
    except ValueError:
        return None


def untrained_network(
    arch: str, num_prototypes: int, dim_hidden: int, dim_out: int,
    device: torch.device | str = "cpu", seed: int = 0,
) -> GroupingNetwork:  # fmt: skip
    """A network of these sizes with random weights and prototypes: what needs no training.

    A function of the seed; torch's generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GroupingNetwork(arch, num_prototypes, dim_hidden, dim_out).to(device).eval()


def untrained_trunk(arch: str, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
    """The trunk of `untrained_network`, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch).to(device).eval()


def sizes_of(config: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's configuration what `untrained_network` needs."""
    return {name: config[name] for name in ("arch", "num_prototypes", "dim_hidden", "dim_out")}
