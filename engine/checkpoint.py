"""Checkpoints: reading without running a stranger's code, and putting a training state back.

Slide: none.
Paper: none.
Differs: the released code reads its checkpoints with the full unpickler.

A training checkpoint (`last.pth`) is a dictionary of tensors and plain values: `format`, `config`,
`step` (optimizer steps taken), `position` (batches consumed), `num_images`, `world_size`,
`seconds`, `model`, `optimizer`, `scaler`, and what adds up for the log: `logged`, `sums`,
`bad_steps`. There is no random state in it: every random choice is a function of the seed and of
the position.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.files import write_atomically

FORMAT = 1  # goes up when older programs could not continue from a file
TRAINING = dict(
    format=int,
    config=Mapping,
    step=int,
    position=int,
    num_images=int,
    world_size=int,
    logged=int,
    sums=list,
    bad_steps=int,
    seconds=(int, float),
    model=Mapping,
    optimizer=Mapping,
    scaler=Mapping,
)


def save(path: str | Path, contents: Any) -> None:
    """torch.save, atomically. Raises OSError where the disk refuses."""
    buffer = io.BytesIO()  # torch's own writer hides "no space left" behind an internal assertion
    torch.save(contents, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def keep_newest(folder: str | Path, keep_last: int, keep_every: int, newest: int) -> None:
    """Of `epoch_0007.pth` and its like, up to the epoch `newest`, keep the last `keep_last` and
    every `keep_every`-th; delete the others. Later epochs are of an earlier run: they stay.
    """
    files = Path(folder).glob("epoch_[0-9]*.pth")
    epochs = sorted((int(re.findall(r"\d+", path.stem)[0]), path) for path in files)
    own = [(epoch, path) for epoch, path in epochs if epoch <= newest]
    for epoch, path in own[: max(len(own) - keep_last, 0)]:
        if not (keep_every and epoch % keep_every == 0):
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ reading


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU, tensors and plain values only; nothing in the file is
    executed. The folder of a run stands for its last.pth.

    Released checkpoints hold their command line as an `argparse.Namespace`: exactly that class is
    let in, and becomes a dictionary. Raises ValueError with one line: missing, truncated, not a
    checkpoint, or with something to execute.
    """
    path = Path(path)
    if (path / "last.pth").is_file():
        path = path / "last.pth"
    if not path.is_file():
        there = (
            sorted(p.name for p in path.parent.glob("*.pth"))[:5] if path.parent.is_dir() else []
        )
        raise ValueError(
            f"no checkpoint at {path}" + (f"; beside it: {', '.join(there)}" if there else "")
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Remarks on old formats: what follows is the contents or one line
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise ValueError(
                f"{path} is refused: it asks to run {found[0]}, and a checkpoint holds tensors and "
                "plain values only; nothing was executed"
            ) from None
        raise ValueError(
            f"{path} is not a checkpoint or is damaged ({os.path.getsize(path)} bytes); "
            "take an earlier one"
        ) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
        ValueError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is truncated or not a checkpoint ({os.path.getsize(path)} bytes: {reason}); "
            "take an earlier one"
        ) from None
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint's dictionary")
    return {k: vars(v) if isinstance(v, argparse.Namespace) else v for k, v in contents.items()}


def step_of(path: str | Path) -> int | None:
    """The step of a training checkpoint, without reading its tensors; None where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["step"])
    except Exception:  # whatever is wrong with it, it is said where it is read
        return None


def tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Its named tensors: whatever else a stranger has put beside them is left out."""
    return {k: v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor)}


def some_keys(mapping: Mapping[str, Any]) -> str:
    """Its first names, for a person."""
    return ", ".join(str(key) for key in list(mapping)[:3]) or "nothing"


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """load_state_dict that refuses any difference with one line: no network stays random unseen."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unexpected or reshaped:
        differences = [f"lacks {len(missing)} tensors, first {missing[0]}"] if missing else []
        differences += (
            [f"has {len(unexpected)} of its own, first {unexpected[0]}"] if unexpected else []
        )
        differences += [
            f"has {name} as {tuple(state[name].shape)} where {tuple(own[name].shape)} is needed"
            for name in reshaped[:1]
        ]
        raise ValueError(
            f"{path} is of another architecture or size: it {'; it '.join(differences)}"
        )
    module.load_state_dict(dict(state))


def restore(
    path: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    differences: Callable[[Mapping[str, Any]], list[str]],
) -> dict[str, Any]:
    """Put a training checkpoint back into model, optimizer and gradient scaler; returns its
    contents.

    differences(contents) names what has changed and must not; it is empty where the run may
    continue. Raises ValueError with one line, before anything is touched, if the file is no
    training state or something changed.
    """
    saved = read(path)
    if not all(isinstance(saved.get(name), kind) for name, kind in TRAINING.items()):
        raise ValueError(
            f"{path} cannot be continued: it holds no training state of this program (found "
            f"{some_keys(saved)}); its network can be evaluated"
        )
    if saved["format"] > FORMAT:
        raise ValueError(
            f"{path} was written by a newer version of this program (format {saved['format']}, "
            f"this one reads up to {FORMAT}): take the newer version"
        )
    changed = differences(saved)
    if changed:
        raise ValueError(
            f"{path} was made with other options ({'; '.join(changed)}): give another "
            "--output-dir, --resume none to start over, or --force-resume"
        )
    load_strictly(model, tensors(saved["model"]), path)
    settings = [
        {k: v for k, v in group.items() if k not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} was made with another optimizer ({error}): give another --output-dir"
        ) from None
    for group, own in zip(optimizer.param_groups, settings):
        group.update(
            own
            # What was learned comes from the file; what was asked for, as the decay, from here.
        )
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return saved


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with the prefix, without it."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
