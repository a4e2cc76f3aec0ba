"""The same beginning and end for every program: one line for what went wrong, and an exit status
that says its kind.

Slide: none. Paper: none. Differs: not in the released code.

Exit status: 0 done; 1 stopped, what was learned is on disk; 2 something that the person who started
it can change; 128 + the number of the signal that ended it, so 130 for Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from engine import processes


class Stopped(Exception):
    """The program cannot go on; one line says why. What it did so far is on disk."""


def run_program(
    name: str, main: Callable[[list[str] | None], int], argv: list[str] | None = None
) -> int:
    """Calls main(argv) and turns what it raises into one line on stderr; returns the exit status.

    name: of the program, as it stands before the line. ValueError and OSError: status 2; Stopped:
    1; Ctrl-C: 130; memory that does not suffice: 2. Every other exception is a mistake of ours and
    keeps its trace."""
    try:
        status = main(argv)
    except (ValueError, OSError) as error:
        return fail(name, error, 2)
    except Stopped as error:
        return fail(name, error, 1)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)
    except RuntimeError as error:
        if not processes.out_of_memory(error):
            raise
        return fail(
            name,
            f"{processes.out_of_memory(error)}: take a smaller --batch-size, --image-size or "
            "network, or "
            "more passes by --accumulate",
            2,
        )
    processes.finish()
    return status


def fail(name: str, reason: Exception | str, status: int) -> int:
    """One line on stderr. One process of many ends at once: a goodbye to the others could wait for
    ever.
    """
    print(f"{name}: {reason}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        processes.end_now(status)
    return status


def path(text: str) -> Path:
    """The type of every option that names a file or folder: `~` is the home folder."""
    return Path(text).expanduser()
