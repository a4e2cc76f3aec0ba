"""The same beginning and end for every program: one line for what went wrong, and an exit status.

Slide: none.
Paper: none.
Differs: not in the released code.

Exit status: 0 done, or paused by a cluster's SIGTERM or SIGUSR1; 1 stopped, what was learned is on
disk; 2 something that the person who started it can change; 128 + the number of the signal that
ended or paused it, so 130 for Ctrl-C and 129 for a lost terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from engine import processes, signals
from engine.streams import make_unbreakable


class Stopped(Exception):
    """The program cannot go on; one line says why. What it did so far is on disk."""


class OfThisRank(ValueError):
    """What only this process has met; every other ValueError is met by all, and rank 0 says it."""


class Interrupted(Exception):
    """Ctrl-C, which every process of a terminal gets."""


def run_program(
    name: str, main: Callable[[list[str] | None], int], argv: list[str] | None = None,
    alone: bool = False,
) -> int:  # fmt: skip
    """Calls main(argv) and turns what it raises into one line on stderr; returns the exit status.

    name: of the program, as it stands before the line; alone: it works in one process, and a
    launcher's others have nothing to do. ValueError and OSError: status 2; Stopped: 1; Ctrl-C: 130;
    memory that does not suffice: 2. Every other exception is a mistake of ours and keeps its trace.
    """
    with make_unbreakable():
        if alone and not processes.leave_the_others(name):
            return 0
        try:
            status = main(argv)
        except (ValueError, OSError) as error:
            return fail(name, error, 2)
        except Stopped as error:
            return fail(name, error, 1)
        except KeyboardInterrupt:
            return fail(name, Interrupted("interrupted"), 130)
        except RuntimeError as error:
            if not signals.out_of_memory(error):
                raise
            advice = (
                "take a smaller --batch-size, --image-size or network, or more passes by "
                "--accumulate"
            )
            return fail(name, f"{signals.out_of_memory(error)}: {advice}", 2)
        processes.finish()
        return status


def fail(name: str, reason: Exception | str, status: int) -> int:
    """One line on stderr. One process of many ends at once: the others may wait for ever."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    of_all = isinstance(reason, ValueError) and not isinstance(reason, OfThisRank)
    said_by_rank_0 = of_all or isinstance(reason, Interrupted)
    if rank == 0 or not said_by_rank_0:
        print(f"{name}: {reason}", file=sys.stderr, flush=True)
    if world_size > 1:
        signals.end_now(status)
    return status


def path(text: str) -> Path:
    """The type of every option that names a file or folder: `~` is the home folder."""
    return Path(text).expanduser()
