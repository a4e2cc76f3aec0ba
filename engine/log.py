"""What a run writes while it runs: log.jsonl, one JSON object per line."""

import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from engine.files import write_atomically


def say(line: str) -> None:
    """A line on stderr, above the bar."""
    tqdm.write(line, file=sys.stderr)


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, whose work was lost, and one that was cut off."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if step_of(line) <= step]
    if kept != lines:
        write_atomically(file, lambda out: out.writelines(kept))


def step_of(line: bytes) -> float:
    """The step of a line; infinite where the line was cut off."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
