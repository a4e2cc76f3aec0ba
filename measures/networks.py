"""The networks that are measured: read from a checkpoint, or random for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbone import ARCHITECTURES, architecture_of, build_backbone
from engine import checkpoints
from grouping import GroupingNetwork

Opened = tuple[nn.Module, dict[str, Any]]


def open_network(path: str | Path, which: str = "teacher", device: Any = "cpu") -> Opened:
    """The student's or the teacher's `GroupingNetwork`, for evaluation, and its configuration.

    The configuration has at least arch, num_prototypes, dim_hidden and dim_out. Raises ValueError
    with one line; for a backbone, the line names what can be measured.
    """
    found = checkpoints.read(path)
    arch = arch_of(found, which)
    if not found.holds_network:
        advice = "give last.pth of the same run, or measure its features with evaluate.py probe"
        missing = "without projector and prototypes it has no groups and no slots"
        raise ValueError(f"{path} is a backbone only ({arch}): {missing}; {advice}")
    state = found.network(which)
    sizes = dict(zip(("num_prototypes", "dim_out"), state["prototypes.weight"].shape))
    sizes |= dict(arch=arch, dim_hidden=len(state["projector.mlp.0.weight"]))
    network = untrained_network(**sizes, device=device)
    checkpoints.load_strictly(network, state, path)
    return network, {**found.config, **sizes}


def open_backbone(path: str | Path, which: str = "teacher", device: Any = "cpu") -> Opened:
    """The backbone of a whole checkpoint or of a backbone.pth, for evaluation, and its
    configuration, which has at least arch. Raises ValueError with one line.
    """
    found = checkpoints.read(path)
    arch = arch_of(found, which)
    backbone = untrained_backbone(arch, device)
    checkpoints.load_strictly(backbone, found.backbone(which), path)
    return backbone, {**found.config, "arch": arch}


def arch_of(found: checkpoints.Checkpoint, which: str) -> str:
    """The configured architecture, or else the one with these tensors. Raises ValueError."""
    state, named = found.backbone(which), found.config.get("arch")
    try:
        return named if named in ARCHITECTURES else architecture_of(state)
    except ValueError as error:
        raise ValueError(f"{found.path} holds no known backbone: {error}") from None


def untrained_network(
    arch: str, num_prototypes: int, dim_hidden: int, dim_out: int,
    device: Any = "cpu", seed: int = 0,
) -> GroupingNetwork:  # fmt: skip
    """A network of these sizes with random weights and prototypes, for evaluation: a function of
    the seed. torch's generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GroupingNetwork(arch, num_prototypes, dim_hidden, dim_out).to(device).eval()


def untrained_backbone(arch: str, device: Any = "cpu", seed: int = 0) -> nn.Module:
    """The backbone of `untrained_network`, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch).to(device).eval()


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's configuration what `untrained_network` needs."""
    return {name: config[name] for name in ("arch", "num_prototypes", "dim_hidden", "dim_out")}
