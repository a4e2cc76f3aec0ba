"""The networks that are measured: read from a checkpoint, or random for comparison."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbone import ARCHITECTURES, TIMM, architecture_of
from engine import checkpoints
from grouping import GroupingNetwork

Opened = tuple[nn.Module, dict[str, Any]]


def open_network(path: str | Path, which: str = "teacher", device: Any = "cpu") -> Opened:
    """A `GroupingNetwork` for evaluation, and its configuration. Raises ValueError, one line."""
    found, arch = read(path, which)
    if not found.holds_network:
        advice = "give last.pth of the same run, or measure its features with evaluate.py probe"
        raise ValueError(f"{path} is a backbone only ({arch}), without groups and slots: {advice}")
    state = found.network(which)
    k, dim_out = state["prototypes.weight"].shape
    dim_hidden = len(state["projector.mlp.0.weight"])
    sizes = dict(arch=arch, num_prototypes=k, dim_hidden=dim_hidden, dim_out=dim_out)
    network = untrained_network(sizes, device)
    checkpoints.load_strictly(network, state, path)
    return network, {**found.config, **sizes, "step": found.contents.get("step", "unknown")}


def open_backbone(
    path: str | Path, which: str = "teacher", device: Any = "cpu", arch: str = ""
) -> Opened:
    """A backbone for evaluation, and its configuration with arch; `arch` is for a file that does
    not say it. Raises ValueError, one line.
    """
    found, arch = read(path, which, arch)
    backbone = untrained_backbone(arch, device)
    checkpoints.load_strictly(backbone, found.backbone(which), path)
    return backbone, {**found.config, "arch": arch, "source": found.source(which)}


def read(path: str | Path, which: str, arch: str = "") -> tuple[checkpoints.Checkpoint, str]:
    """A checkpoint and its architecture: named, known by its tensors, or `arch`. ValueError."""
    found = checkpoints.read(path)
    state, named = found.backbone(which), found.config.get("arch")
    try:
        known = named in ARCHITECTURES or str(named).startswith(TIMM)
        return found, named if known else architecture_of(state)
    except ValueError as error:
        if arch:
            return found, arch
        timm = "last.pth of its run names a network of timm, and transfer.py has --arch timm:NAME"
        raise ValueError(f"{path} holds no known backbone: {error}; {timm}") from None


def untrained_network(config: Mapping, device: Any = "cpu", seed: int = 0) -> GroupingNetwork:
    """Random weights, by the seed alone; config: arch, sizes. torch's generator does not move."""
    names = ("arch", "num_prototypes", "dim_hidden", "dim_out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GroupingNetwork(**{name: config[name] for name in names}).to(device).eval()


def untrained_backbone(arch: str, device: Any = "cpu", seed: int = 0) -> nn.Module:
    """The backbone of `untrained_network`, with the same weights."""
    sizes = dict(arch=arch, num_prototypes=1, dim_hidden=1, dim_out=1)
    return untrained_network(sizes, device, seed).backbone
