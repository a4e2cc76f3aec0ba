"""Checkpoints: one reader for all of them, which runs nothing, under our names; one way back."""

import argparse
import hashlib
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from engine.files import found_in, write_atomically
from engine.options import checkpoint_path

WAYS_OUT = "--resume none starts over in this folder, and another --output-dir keeps both"
FORMAT = 1  # goes up when older programs could not continue from a file
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
HEADS = (  # not all of head.*: a ConvNeXt of timm has a norm there
    *("fc.", "head.weight", "head.bias", "head.fc.", "head.mlp.", "head.last_layer."),
    *("projector.", "predictor.", "projection_head.", "prototypes."),
)
UNKNOWN = "its first bytes are those of nothing known"
OTHERS = {  # how files begin that are no checkpoints, and what torch says -> what they are
    r"PK.*(reading zip archive|Errno 22)": "a part is missing; take an earlier one, or train anew",
    r"\s*<": "a web page; download the file itself",
    r"version https://git-lfs": "a pointer of git-lfs; `git lfs pull` brings the file itself",
    r"PK.*TorchScript": "TorchScript; take its state_dict()",
    r"PK.*(hasRecord|data\.pkl|subdirectory)": "a zip of other files; unpack it",
    r"\x80[\3-\5]": "a pickle, as *.pkl of detectron2; take the *.pth that it was made from",
    r".*Weights only load failed": UNKNOWN,
}


class Checkpoint:
    """The networks in a file. path: of the file; contents: its dictionary."""

    def __init__(self, path: Path, contents: Mapping[str, Any]):
        self.path, self.contents = path, contents
        config = contents.get("config") or contents.get("args")
        config = getattr(config, "__dict__", config)  # of an argparse.Namespace
        self.config: dict[str, Any] = dict(config) if isinstance(config, Mapping) else {}
        self.state = released_names(tensors_of(contents))
        self.holds_network = any(key.startswith("student.") for key in self.state)
        names = ((p, k.removeprefix(p)) for p in PREFIXES for k in self.state if k.startswith(p))
        self.prefix = next((p for p, name in names if not name.startswith(HEADS)), "")

    def source(self, which: str = "teacher") -> str:
        """The file, and which of its tensors are the backbone."""
        names = f"{which}.backbone." if self.holds_network else self.prefix
        return f"{self.path} ({names}*)" if names else str(self.path)

    def network(self, which: str = "teacher") -> dict[str, Tensor]:
        """The backbone.*, projector.* and prototypes.weight of one network. Raises ValueError."""
        state = part(self.state, f"{which}.")
        if not state.keys() >= {"prototypes.weight", "projector.mlp.0.weight"}:
            found = f"found {some_keys(self.state)}; give last.pth of a run of train.py"
            raise ValueError(f"{self.path} holds no {which} with projector and prototypes: {found}")
        return state

    def backbone(self, which: str = "teacher") -> dict[str, Tensor]:
        """The backbone alone, without fc.*: torchvision's names for a ResNet. Raises ValueError."""
        if self.holds_network:
            return part(self.state, f"{which}.backbone.")
        if which != "teacher":
            raise ValueError(f"{self.path} is one backbone, so there is no {which} in it")
        state = part(self.state, self.prefix).items()
        if found := {k: v for k, v in state if not k.startswith(HEADS)}:
            return found
        keys = some_keys(self.state or self.contents)
        raise ValueError(f"{self.path} holds no backbone: found {keys}")


def read(path: str | Path) -> Checkpoint:
    """The checkpoint in a file; of a folder, its last.pth. Raises ValueError with one line."""
    path = checkpoint_path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; {found_in(path)}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # decoders meet damaged files with exceptions of every kind
        raise ValueError(f"{path} is no checkpoint, or damaged: {kind_of(path, error)}") from None
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a checkpoint's dictionary")
    found = Checkpoint(path, contents)
    for name, value in found.state.items():
        if value.is_floating_point() and not value.isfinite().all():
            advice = "the run diverged, or the file is damaged: take an earlier one"
            raise ValueError(f"{path}: {name} has numbers that are not finite; {advice}")
    return found


def kind_of(path: Path, error: Exception) -> str:
    """What a file is that torch refuses, for a person."""
    text = str(error).strip() or type(error).__name__
    if forbidden := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", text):
        return f"it asks to run {forbidden[1]}, which a checkpoint needs not; nothing was run"
    with path.open("rb") as file:
        found = file.read(40).decode("latin-1") + text
    kinds = (kind for way, kind in OTHERS.items() if re.match(way, found, re.DOTALL))
    # The bytes of a text are taken for instructions, which fail anywhere
    known = isinstance(error, (RuntimeError, OSError))
    return next(kinds, textwrap.shorten(text, 100, placeholder=" ...") if known else UNKNOWN)


def weights_digest(network: torch.nn.Module) -> str:
    """A hash of all tensors."""
    found = hashlib.sha256()
    for weights in network.state_dict().values():
        found.update(weights.cpu().numpy().tobytes())
    return found.hexdigest()


def released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the marks of wrappers, and the released SlotCon's under our names."""
    state = {re.sub(r"(^module\.|_orig_mod\.)", "", key): value for key, value in state.items()}
    if not any(key.startswith("grouping_q.") for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        old = next((name for name in RELEASED if key.startswith(name)), "")
        new = RELEASED.get(old, "") + key.removeprefix(old)
        renamed[new] = value.reshape(-1) if key == "center" else value  # (1 k) there, (k) here
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
    """torch.save of tensors on the CPU, atomically. Raises OSError where the disk refuses."""
    buffer = io.BytesIO()  # torch's own writer hides "no space left" behind an internal assertion
    torch.save(tree_map_only(Tensor, Tensor.cpu, contents), buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_strictly(module: torch.nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """load_state_dict that refuses any difference with one line: no network stays random unseen."""
    own = module.state_dict()
    # Files of torch before 0.4.1 lack the counts of batches; nothing depends on their values.
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **state}
    needed, given = ({f"{k} {tuple(v.shape)}" for k, v in s.items()} for s in (own, state))
    if needed != given:
        pairs = (needed - given, given - needed)
        lacks, more = (", such as ".join([str(len(x)), *sorted(x)[:1]]) for x in pairs)
        found = f"tensors that it lacks: {lacks}; that it has too many: {more}"
        raise ValueError(f"{path} is of another architecture or size: {found}")
    module.load_state_dict(state)


def start_from(model: torch.nn.Module, path: str) -> str:
    """Start a new SlotCon from a checkpoint, or both networks from one backbone -> what was used,
    in words. Raises ValueError where the backbone is not there as a whole.
    """
    found, own = read(path), model.state_dict()
    given = found.state
    if not found.holds_network:
        networks, backbone = ("student", "teacher"), found.backbone()
        given = {f"{n}.backbone.{k}": v for n in networks for k, v in backbone.items()}
    used = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    needed = {k for k in own if ".backbone." in k and "num_batches_tracked" not in k}
    if missing := sorted(needed - used.keys()):
        arch = f"--arch {found.config['arch']}" if "arch" in found.config else "the file's --arch"
        lacks = f"{len(missing)} of its tensors are missing or of another shape, first {missing[0]}"
        reason = f"{lacks}; found {some_keys(given)}; give {arch}"
        raise ValueError(f"--init {path} does not hold this backbone: {reason}")
    model.load_state_dict({**own, **used})
    source = path if found.holds_network else found.source()
    rest = ", the others are random" * (len(used) < len(own))
    return f"{source}: {len(used)} of {len(own)} tensors used{rest}"


def restore(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, changed: Callable[[Mapping[str, Any]], list[str]],
) -> Mapping[str, Any]:  # fmt: skip
    """Put a training checkpoint back -> its contents. Raises ValueError where it is none, or where
    something has `changed`.
    """
    saved = read(path).contents
    if saved.get("format", math.inf) > FORMAT:
        found = f"it holds no training state (found {some_keys(saved)}), or one of a newer version"
        raise ValueError(f"{path} cannot be continued: {found}; its network can be evaluated")
    if differences := changed(saved):
        found = f"{path} was made with other options or images ({'; '.join(differences)})"
        force = "--resume force goes on all the same, where the network has the same tensors"
        raise ValueError(f"{found}: {force}; {WAYS_OUT}")
    try:
        load_strictly(model, saved["model"], path)
        restore_optimizer(optimizer, saved["optimizer"], path)
    except ValueError as error:
        raise ValueError(f"{error}: {WAYS_OUT}") from None
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return saved


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: Path
) -> None:
    """What was learned comes from the file; what was asked for, as the decay, stays."""
    asked = optimizer.state_dict()["param_groups"]
    now, then = ([group["params"] for group in groups] for groups in (asked, saved["param_groups"]))
    if now != then:
        raise ValueError(f"{path} was made with another optimizer (its groups have other weights)")
    optimizer.load_state_dict({**saved, "param_groups": asked})
    for weight, state in optimizer.state.items():
        # Fused optimizers pair the numbers of a weight and of its state as they lie in memory.
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
