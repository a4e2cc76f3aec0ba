"""What a run prints and writes while it runs: log.jsonl, the same for the eye, a progress bar."""

import datetime
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import files


def say(line: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(line, file=sys.stderr)


class Log:
    """The log and the screen of the main process, for a run that starts at `step`."""

    def __init__(self, file: Path, step: int, last_step: int, tensorboard: bool = False):
        self.file, self.first_step, self.last_step = file, step, last_step
        self.began = time.perf_counter()
        self.board = board_of(file.parent, step) if tensorboard else None
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if step_of(line) <= step]  # later work was lost
        if kept != lines:
            files.write_atomically(file, lambda out: out.writelines(kept))
        look = dict(unit="step", ncols=79, leave=False, disable=not sys.stderr.isatty())
        self.bar = tqdm(total=last_step, initial=step, **look)

    def print(self, text: str) -> None:
        """Text on stdout, above the bar."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def write(self, record: Mapping[str, float], brief: str) -> None:
        """One line of the log; brief: the same for the eye. A full disk costs this line."""
        step = int(record["step"])
        self.print(f"step {step}/{self.last_step}  {brief}{self.time_left(step)}")
        try:
            with self.file.open("a") as out:
                out.write(json.dumps(record) + "\n")
        except OSError as error:
            say(f"could not write to {self.file}: {error.strerror or error}; the run goes on")
        for name, value in record.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def time_left(self, step: int) -> str:
        """How long the run will go on, after a few steps."""
        done, left = step - self.first_step, self.last_step - step
        if done < 3 or not left:
            return ""
        seconds = round((time.perf_counter() - self.began) / done * left)
        return f"  {datetime.timedelta(seconds=seconds)} left"

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()
        if self.board:
            self.board.close()


def board_of(folder: Path, step: int) -> Any:
    """TensorBoard's writer. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs it: pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=step + 1)


def step_of(line: bytes) -> float:
    """The step of a line; infinite where the line was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
