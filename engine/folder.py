"""Before a run begins: whether it can, and what an earlier one left in its folder."""

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.images import digest_of
from engine.log import say
from engine.options import flag
from engine.ranks import gather_objects

# Options that may differ between machines, beside the images' names, which are compared alone
PLACES = {"data_dir", "output_dir", "init", "backbone", "json", "workers", "threads", "device"}


def require_batches(size: int, images: int, processes: int, parts: int) -> None:
    """Raises ValueError where so many images fill no batch, or a batch has no equal parts."""
    if size > images:
        advice = "lower it, or add images"
        raise ValueError(f"--batch-size {size}, but {images} images to learn from: {advice}")
    if size % (processes * parts):
        found = f"{processes} process(es) x --accumulate {parts}"
        raise ValueError(f"--batch-size {size} must be a multiple of {found}")


def require_space(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where last.pth, and its successor before it replaces it, do not fit."""
    kept = 1 if isinstance(optimizer, torch.optim.SGD) else 2  # velocity, or two moments
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    size = sum(t.nbytes for t in (*model.state_dict().values(), *trained * kept))
    size *= 1 if (folder / "last.pth").exists() else 2
    free = shutil.disk_usage(folder).free
    if size > free:
        found = f"checkpoints need {size / 1e9:.3f} GB and {free / 1e9:.3f} GB are free"
        raise ValueError(f"the disk of {folder} is too small: {found}")


def require_agreement(
    folder: Path, position: int, images: Sequence[Any], settings: Mapping[str, Any]
) -> None:
    """Raises ValueError where the processes have different checkpoints, images or options."""
    names = settings.get("images") or digest_of(getattr(images, "paths", ()))
    found = gather_objects((position, len(images), names, settings))
    positions, *lists, given = zip(*found)
    chosen = settings.keys() - PLACES - {"images"}
    for name in sorted(chosen, key=lambda name: (name != "task", name)):
        values = [other.get(name) for other in given]
        if any(value != settings[name] for value in values):
            found = f"{flag(name)} with {values}"
            raise ValueError(f"the processes were given {found}: every one needs the same options")
    must = "every machine must see the same"
    if len(set(positions)) > 1:
        found = f"different states of {folder}/last.pth (batches: {[*positions]})"
        raise ValueError(f"the processes found {found}: {must} --output-dir")
    if len({*zip(*lists)}) > 1:
        found = f"different images ({[*lists[0]]}, or other names)"
        raise ValueError(f"the processes found {found}: {must} --data-dir")


def begin_anew(folder: Path, resume: str) -> None:
    """What becomes of an earlier run, before a new one; resume: the option. Raises OSError."""
    earlier = (folder / "config.json").exists()
    if earlier and any(folder.glob("*.pth")):
        put_away(folder)
    elif resume == "force" or (resume == "auto" and earlier):
        say(f"{folder}: no last.pth of an earlier run, a new run starts")


def put_away(folder: Path) -> None:
    """The files of an earlier run into previous_1/, previous_2/, ... Raises OSError."""
    places = (folder / f"previous_{n}" for n in itertools.count(1))
    previous = next(place for place in places if not place.exists())
    previous.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != "run.lock":
            file.replace(previous / file.name)
    say(f"{folder}: the files of the earlier run are in {previous.name}/ now")
