"""What a run says: on the screen before it starts, in the log while it runs.

Paper: none. Differs: the released code logs the sum of the losses as text.
Read next: train.py; the README says what each key of the log means.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from engine import files, processes


def introduce(c, place: processes.Place, about: str, model: nn.Module, steps_per_epoch: int, lr: float, dtype):
    """What is about to happen, on one screen. c: the configuration; about: the data in words; dtype: of autocast."""
    def count(part: nn.Module) -> float:
        return sum(p.numel() for p in part.parameters() if p.requires_grad) / 1e6

    half = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    ln_k = math.log(c.num_prototypes)
    print(f"device   {processes.describe(place)}, {half}")
    print(f"data     {about}")
    print(f"network  {c.arch} {count(model.student.backbone):.2f} M, projector {count(model.student.projector):.2f} M, "
          f"{c.num_prototypes} prototypes; {count(model):.2f} M parameters trained")
    print(f"batch    {c.batch_size} = {c.batch_size // place.world_size} x {place.world_size} process(es); "
          f"{steps_per_epoch} steps per epoch, {steps_per_epoch * c.epochs} in all")
    print(f"lr       {lr:g} = {c.base_lr:g} x {c.batch_size} / 256, {c.optimizer}, warm-up {c.warmup_epochs:g} epochs")
    print(f"chance   ln k = {ln_k:.4f}; the group loss, a sum of two directions, is {2 * ln_k:.4f} for a uniform "
          "assignment", flush=True)


def brief(record: dict) -> str:
    """A line of the log for the eye."""
    return (f"loss {record['loss']:.3f} (group {record['group_loss']:.3f}, slot {record['slot_loss']:.3f})  "
            f"occupied {record['occupied_per_image']:.1f}  in use {record['prototypes_used']}  "
            f"agreement {record['agreement']:.2f}  {record['images_per_second']:.0f} images/s")


class Log:
    """log.jsonl, one object per line; also TensorBoard's, if asked for. A full disk costs lines, not the run.

    step: where the run starts. Lines of later steps are of work that was lost, and go. Raises OSError if they cannot,
    ValueError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        self.file, self.board = folder / "log.jsonl", None
        self.forget_after(step)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard, but it is not installed: pip install tensorboard") from None
            self.board = SummaryWriter(folder, purge_step=step + 1)

    def forget_after(self, step: int) -> None:
        if not self.file.exists():
            return
        lines = self.file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if step_of(line) <= step]
        if kept != lines:
            files.write_atomically(self.file, lambda file: file.writelines(kept))

    def write(self, record: dict) -> None:
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            say(f"could not write to {self.file}: {error.strerror or error}; the run goes on without this line")
        for name, value in record.items() if self.board else ():
            self.board.add_scalar(name, value, record["step"])


def step_of(line: bytes) -> float:
    """The step of a line of the log; infinite where the line was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def say(line: str) -> None:
    """A line above the progress bar."""
    tqdm.write(line, file=sys.stderr)


def write_json(path: Path, contents: dict) -> None:
    """Atomically, like a checkpoint."""
    text = json.dumps(contents, indent=1) + "\n"
    files.write_atomically(path, lambda file: file.write(text.encode()))
