"""Checkpoints: one reader for all of them, under the names of this repository; one way back.

A training checkpoint (last.pth) is a dictionary of tensors and plain values; there is no random
state in it, since every random choice is a function of the seed and of the position in the run.
Nothing in a file is ever executed.
"""

from __future__ import annotations

import argparse
import io
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.files import write_atomically

FORMAT = 1  # goes up when older programs could not continue from a file
TRAINING = {"format", "config", "step", "position", "num_images", "world_size", "model",
            "optimizer", "scaler", "logged", "sums", "bad_steps", "seconds"}  # fmt: skip
# Names of the released SlotCon -> names here. The released `_k` networks are the teacher.
RELEASED = {
    "encoder_q.": "student.backbone.",
    "encoder_k.": "teacher.backbone.",
    "projector_q.": "student.projector.",
    "projector_k.": "teacher.projector.",
    "grouping_q.slot_embed.": "student.prototypes.",
    "grouping_k.slot_embed.": "teacher.prototypes.",
    "predictor_slot.": "predictor.",
}
WRAPPERS = ("model", "state_dict", "teacher", "student")  # under which files keep their tensors
# What stands before the names of a backbone in files of other methods, the slow network first
PREFIXES = ("momentum_encoder.", "backbone.", "encoder_q.", "base_encoder.", "encoder.", "")
HEADS = ("fc.", "head.", "projector.", "predictor.", "projection_head.", "prototypes.")


class Checkpoint:
    """The networks in a file. path: of the file; contents: its dictionary."""

    def __init__(self, path: Path, contents: Mapping[str, Any]):
        self.path, self.contents = path, contents
        config = contents.get("config") or contents.get("args")
        self.config: dict[str, Any] = dict(config) if isinstance(config, Mapping) else {}
        self.state = released_names(tensors_of(contents))
        self.holds_network = any(key.startswith("student.") for key in self.state)

    def network(self, which: str = "teacher") -> dict[str, Tensor]:
        """The backbone.*, projector.* and prototypes.weight of one network. Raises ValueError."""
        state = part(self.state, f"{which}.")
        if "prototypes.weight" not in state or "projector.mlp.0.weight" not in state:
            raise ValueError(
                f"{self.path} holds no {which} with projector and prototypes: found "
                f"{some_keys(self.state)}; give last.pth of a run of train.py"
            )
        return state

    def backbone(self, which: str = "teacher") -> dict[str, Tensor]:
        """The backbone alone, without fc.*: torchvision's names for a ResNet. Raises ValueError."""
        if self.holds_network:
            return part(self.state, f"{which}.backbone.")
        if which != "teacher":
            raise ValueError(f"{self.path} is one backbone, so there is no {which} in it")
        for prefix in PREFIXES:
            state = part(self.state, prefix)
            state = {k: v for k, v in state.items() if not k.startswith(HEADS)}
            if state:
                return state
        raise ValueError(f"{self.path} holds no backbone: found {some_keys(self.contents)}")


def read(path: str | Path) -> Checkpoint:
    """The checkpoint in a file; of a folder, its last.pth. Raises ValueError with one line."""
    path = Path(path)
    path = path / "last.pth" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # decoders meet damaged files with exceptions of every kind
        raise ValueError(f"{path} is no checkpoint, or damaged: {why_unreadable(error)}") from None
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint's dictionary")
    plain = {k: vars(v) if isinstance(v, argparse.Namespace) else v for k, v in contents.items()}
    return Checkpoint(path, plain)


def why_unreadable(error: Exception) -> str:
    """One line about a file that torch.load refuses."""
    forbidden = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
    if forbidden:
        return f"it asks to run {forbidden[1]}, which a checkpoint needs not; nothing was run"
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__


def released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the marks of wrappers; the released SlotCon's under our names, where
    `center` (1 k) becomes (k).
    """
    state = {re.sub(r"(^module\.|_orig_mod\.)", "", key): value for key, value in state.items()}
    if not any(key.startswith("grouping_q.") for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        old = next((name for name in RELEASED if key.startswith(name)), "")
        new = RELEASED.get(old, "") + key.removeprefix(old)
        renamed[new] = value.reshape(-1) if key == "center" else value
    return renamed


def tensors_of(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named tensors of a file, wherever it keeps them."""
    for name in WRAPPERS:
        if isinstance(contents.get(name), Mapping):
            return tensors_of(contents[name])
    return {k: v for k, v in contents.items() if isinstance(k, str) and isinstance(v, Tensor)}


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def some_keys(mapping: Mapping[str, Any]) -> str:
    """Its first names, for a person."""
    return ", ".join(str(key) for key in list(mapping)[:3]) or "nothing"


def save(path: str | Path, contents: Any) -> None:
    """torch.save, atomically. Raises OSError where the disk refuses."""
    buffer = io.BytesIO()  # torch's own writer hides "no space left" behind an internal assertion
    torch.save(contents, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """load_state_dict that refuses any difference with one line: no network stays random unseen."""
    own = module.state_dict()
    # Files of torch before 0.4.1 lack the counts of batches; nothing depends on their values.
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **state}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    found = [f"it lacks {len(missing)} tensors, first {missing[0]}"] if missing else []
    if unexpected:
        found.append(f"it has {len(unexpected)} tensors too many, first {unexpected[0]}")
    found += [
        f"it has {k} as {tuple(state[k].shape)} where {tuple(own[k].shape)} is needed"
        for k in reshaped[:1]
    ]
    if found:
        raise ValueError(f"{path} is of another architecture or size: {'; '.join(found)}")
    module.load_state_dict(state)


def start_from(model: torch.nn.Module, path: str) -> str:
    """Start a new SlotCon from a checkpoint or a backbone -> what was used, in one line.

    A backbone goes into student and teacher. Raises ValueError where it is not there as a whole.
    """
    found, own = read(path), model.state_dict()
    given = found.state
    if not found.holds_network:
        backbone = found.backbone().items()
        given = {
            f"{which}.backbone.{k}": v for which in ("student", "teacher") for k, v in backbone
        }
    used = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    missing = [
        k for k in own if ".backbone." in k and k not in used and "num_batches_tracked" not in k
    ]
    if missing:
        raise ValueError(
            f"--init {path} does not hold this backbone: {len(missing)} of its tensors are missing "
            f"or of another shape, first {missing[0]}; found {some_keys(given)}; give its --arch"
        )
    model.load_state_dict({**own, **used})
    return f"{path}: {len(used)} of {len(own)} tensors used, the others are random"


def restore(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    changed: Callable[[Mapping[str, Any]], list[str]],
) -> Mapping[str, Any]:
    """Put a training checkpoint back into model, optimizer and gradient scaler -> its contents.

    changed(contents) names what has changed and must not. Raises ValueError with one line, before
    anything moves, if the file is no training state or something changed.
    """
    saved = read(path).contents
    if not saved.keys() >= TRAINING or saved["format"] > FORMAT:
        raise ValueError(
            f"{path} cannot be continued: it holds no training state of this program (found "
            f"{some_keys(saved)}), or one of a newer version; its network can be evaluated"
        )
    differences = changed(saved)
    if differences:
        raise ValueError(
            f"{path} was made with other options ({'; '.join(differences)}): give another "
            "--output-dir, --resume none to start over, or --resume force"
        )
    load_strictly(model, saved["model"], path)
    restore_optimizer(optimizer, saved["optimizer"], path)
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return saved


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: Path
) -> None:
    """What was learned comes from the file; what was asked for, as the decay, stays."""
    asked = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} was made with another optimizer ({error})") from None
    for group, settings in zip(optimizer.param_groups, asked):
        group.update(settings)
    for weight, state in optimizer.state.items():
        # Fused optimizers pair the numbers of a weight and of its state as they lie in memory.
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
