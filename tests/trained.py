"""Numbers, networks, checkpoints and logs that tests share."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine import checkpoints
from grouping import GroupingNetwork

K = 5
COLORS = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=torch.uint8)  # (t 3)
NAMES = ("red", "green", "blue")

RELEASED = {  # our names -> those of the released code
    "student.backbone": "encoder_q",
    "teacher.backbone": "encoder_k",
    "student.projector": "projector_q",
    "teacher.projector": "projector_k",
    "student.prototypes": "grouping_q.slot_embed",
    "teacher.prototypes": "grouping_k.slot_embed",
    "predictor": "predictor_slot",
    "center": "center",
}


def released_name(ours: str) -> str:
    """What the released code calls this tensor."""
    for here, there in RELEASED.items():
        if ours.startswith(here):
            return there + ours.removeprefix(here)
    raise KeyError(ours)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64 that depend on shape and seed alone."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class ByColor(torch.nn.Module):
    """A network that solves `COLORS`: prototype 4 - t owns the pixels of class t.

    sighted=False: prototype 4 owns every pixel.
    """

    def __init__(self, sighted: bool = True):
        super().__init__()
        self.prototypes, self.sighted = torch.nn.Embedding(K, 3), sighted

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        similarity = torch.zeros(len(images), K, *images.shape[-2:])
        if self.sighted:
            similarity.scatter_(1, 4 - images.argmax(1, keepdim=True), 1.0)  # over rgb
        else:
            similarity[:, 4] = 1
        return None, similarity


def write(path: Path, array) -> None:
    """Gray levels, colors or ids (y x [3]), in 16 bits where 8 are too few."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array)
    Image.fromarray(array.astype(np.uint16 if array.max() > 255 else np.uint8)).save(path)


def colored(b: int = 5, y: int = 6, x: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (b 3 y x) in `COLORS` and their labels (b y x)."""
    label = torch.randint(0, 3, (b, y, x), generator=torch.Generator().manual_seed(seed))
    return COLORS[label].permute(0, 3, 1, 2), label


def save_checkpoint(path: Path, arch: str = "tiny", **config) -> Path:
    """An untrained checkpoint whose networks differ, and the teacher's backbone.pth beside it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        networks = {which: GroupingNetwork(arch, K, 12, 6) for which in ("teacher", "student")}
    state = {
        f"{which}.{name}": tensor
        for which, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    config = dict(dict(arch=arch, image_size=32, temp_teacher=0.07), **config)
    checkpoints.save(path, dict(model=state, config=config))
    checkpoints.save(path.with_name("backbone.pth"), networks["teacher"].backbone.state_dict())
    return path


def record(step: int, **other) -> dict:
    """A line of log.jsonl."""
    usual = dict(
        step=step, loss=1.0, group_loss=5.0, slot_loss=2.0, lr=0.1, momentum_teacher=0.99,
        grad_norm=1.0, occupied_per_image=6.0, prototypes_used=9, entropy_teacher=1.0,
        entropy_mean=2.5, agreement=0.6, images_per_second=90.0, data_seconds=0.01, skipped_steps=0,
    )  # fmt: skip
    return dict(usual, **other)


def write_run(folder: Path, lines: list[str], **config) -> Path:
    """The files of a run that its curves are drawn from."""
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(lines))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
