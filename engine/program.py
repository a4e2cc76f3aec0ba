"""The same beginning and end for every program: one line for what went wrong, and an exit status.

Exit status: 0 done, or paused by a cluster's signal; 1 stopped, and what was learned is on disk;
2 something that the person who started it can change; 130 Ctrl-C. A mistake of ours keeps its
trace. This file loads no torch.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Idle threads sleep: where they spin, two runs on one machine slow each other down many times.
# The setting counts before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What the transports between processes say when one of them ended
LOST = re.compile(r"gloo|nccl|TCPStore|connection (closed|reset|refused)", re.IGNORECASE)


class Stopped(Exception):
    """The program cannot go on; one line says why. What it did so far is on disk."""


def run_early(name: str, parse: Callable[[Sequence[str] | None], Any]) -> None:
    """Parse the command line before torch is loaded: exits with one line where it is wrong."""
    try:
        parse(None)
    except ValueError as error:
        sys.exit(fail(name, error, 2))


def run_program(
    name: str, main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> int:
    """Calls main(argv) and turns what it raises into one line on stderr; returns the status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is written as \\u043c
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        return fail(name, error, 2)
    except Stopped as error:
        return fail(name, error, 1)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)
    except RuntimeError as error:
        line = (str(error).splitlines() or [""])[0][:120]
        if "out of memory" in line or "can't allocate memory" in line:
            return fail(name, f"{line}: take a smaller --batch-size, --image-size or network", 2)
        if LOST.search(line) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return fail(name, f"another process is gone, and may say why ({line})", 1)
        raise


def fail(name: str, reason: Exception | str, status: int) -> int:
    """One line on stderr, from every process that meets it -> the status."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f"rank {os.environ.get('RANK')}: " if several else ""
    with contextlib.suppress(OSError):  # nobody reads any more
        print(f"{name}: {rank}{reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if several:  # ends at once: a group of processes that is taken apart waits for the others
        os._exit(status)
    return status
