"""What a run says while it runs: one JSON object per line in log.jsonl, a progress bar or plain
lines on the screen.

Slide: none.
Paper: none.
Differs: the released code logs the sum of the losses as text. docs/training.md says what each key
of the log means.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import files


class Journal:
    """The log and the screen of the main process; on every other rank all calls do nothing.

    folder: of the run; step: where the run starts, lines of later steps are of work that was lost
    and are removed; last_step: where it ends. Raises OSError if the lines cannot be removed,
    ValueError where TensorBoard is wanted and not installed.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        last_step: int,
        is_main: bool = True,
        tensorboard: bool = False,
    ):
        self.is_main, self.last_step, self.first_step = is_main, last_step, step
        self.began = time.perf_counter()
        self.log = Log(folder, step, tensorboard) if is_main else None
        self.bar = tqdm(
            total=last_step,
            initial=step,
            disable=not (is_main and sys.stderr.isatty()),
            unit="step",
        )

    def records(self) -> list[dict[str, Any]]:
        """The lines of the log so far; on ranks that write none, none."""
        return self.log.read() if self.log else []

    def advance(self) -> None:
        """One step was taken."""
        self.bar.update()

    def write(self, record: Mapping[str, Any], brief: str) -> None:
        """A line of the log, and the same in brief for the eye."""
        if not self.is_main:
            return
        self.log.write(record)
        self.bar.set_postfix_str(brief)
        if self.bar.disable:
            left = self.time_left(record["step"])
            print(f"step {record['step']}/{self.last_step}  {brief}{left}", flush=True)

    def time_left(self, step: int) -> str:
        """How long the run will go on, after a few steps."""
        done, left = step - self.first_step, self.last_step - step
        if done < 3 or not left:
            return ""
        seconds = round((time.perf_counter() - self.began) / done * left)
        if seconds < 3600:
            return f"  {seconds // 60}:{seconds % 60:02d} left"
        return f"  {seconds // 3600} h {seconds // 60 % 60:02d} left"

    def print(self, text: str) -> None:
        """Plain text on stdout, from one process of many."""
        if self.is_main:
            print(text, flush=True)

    def remark(self, lines: Iterable[str]) -> None:
        """Lines about a run that goes on, above its progress bar, from one process of many."""
        for line in lines if self.is_main else ():
            with tqdm.external_write_mode():
                print(line, flush=True)

    def close(self) -> None:
        """Take the progress bar away."""
        self.bar.close()


class Log:
    """log.jsonl, one object per line; also TensorBoard's, if asked for. A full disk costs lines,
    not the run.

    step: where the run starts. Lines of later steps are of work that was lost, and are removed.
    Raises OSError if they cannot be, ValueError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        self.file, self.board = folder / "log.jsonl", None
        self.forget_after(step)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError(
                    "--tensorboard, but it is not installed: pip install tensorboard"
                ) from None
            self.board = SummaryWriter(folder, purge_step=step + 1)

    def forget_after(self, step: int) -> None:
        """Remove the lines of later steps."""
        if not self.file.exists():
            return
        lines = self.file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if step_of(line) <= step]
        if kept != lines:
            files.write_atomically(self.file, lambda file: file.writelines(kept))

    def read(self) -> list[dict[str, Any]]:
        """All lines, as objects."""
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_bytes().splitlines() if line.strip()]

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line."""
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            say(
                f"could not write to {self.file}: {error.strerror or error}; the run goes on "
                "without this line"
            )
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
