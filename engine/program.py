"""The same beginning and end for every program: one line for what went wrong, and an exit status.

Exit status: 0 done, or paused by a cluster's signal; 1 stopped, and what was learned is on disk;
2 something that the person who started it can change; 130 Ctrl-C. A mistake of ours keeps its
trace. This file loads no torch, so a wrong option is answered at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

# What the transports between processes say when one of them ended
LOST = re.compile(r"gloo|nccl|TCPStore|connection (closed|reset|refused)", re.IGNORECASE)


class Stopped(Exception):
    """The program cannot go on; one line says why. What it did so far is on disk."""


def run_early(name: str, parse: Callable[[Sequence[str] | None], Any]) -> None:
    """Parse the command line before torch is loaded: exits with one line where it is wrong.

    name: of the program, as it stands before the line; parse(None): reads sys.argv, and raises
    ValueError with one line.
    """
    try:
        parse(None)
    except ValueError as error:
        sys.exit(fail(name, error, 2))


def run_program(
    name: str, main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> int:
    """Calls main(argv) and turns what it raises into one line on stderr; returns the status.

    ValueError and OSError: status 2; Stopped: 1; Ctrl-C: 130; memory that does not suffice: 2;
    another process that is gone: 1. Output that nobody reads, or that a full disk refuses, stops
    no program.
    """
    out, err = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = outcome(name, main, argv)
        out.flush()
    return status


def outcome(name: str, main: Callable, argv: Sequence[str] | None) -> int:
    """As `run_program`."""
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        return fail(name, error, 2)
    except Stopped as error:
        return fail(name, error, 1)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)
    except RuntimeError as error:
        line = (str(error).splitlines() or [""])[0]
        if "out of memory" in line or "can't allocate memory" in line:
            advice = "take a smaller --batch-size, --image-size or network"
            return fail(name, f"out of memory: {advice} ({line[:120]})", 2)
        if LOST.search(line) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return fail(name, f"another process is gone, and may say why ({line[:120]})", 1)
        raise


def fail(name: str, reason: Exception | str, status: int) -> int:
    """One line on stderr, from every process that meets it. Of many processes this one ends at
    once: a group of processes that is taken apart would wait for the others.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = f"rank {os.environ.get('RANK')}: " if world_size > 1 else ""
    print(f"{name}: {rank}{reason}", file=sys.stderr, flush=True)
    if world_size > 1:
        sys.stdout.flush()
        os._exit(status)
    return status


class Unbreakable:
    """A stream that never raises: once a write fails, all that follows goes to the null device."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is written as \\u043c
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, where it is possible; -> the length of the text."""
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, where it is possible."""
        self.attempt(self.stream.flush)

    def attempt(self, act: Callable, *given: str) -> None:
        """Call a method of the stream. What is still in its buffer is given up with it."""
        try:
            act(*given)
        except (OSError, ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
