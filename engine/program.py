"""The same beginning and end for every program: one line for what went wrong, and an exit status.

Exit status: 0 done, or paused by a cluster's signal; 1 stopped, and what was learned is on disk;
2 something that the person who started it can change; 130 Ctrl-C, or SIGTERM outside a run. A
mistake of ours keeps its trace. This file loads no torch.
"""

import atexit
import contextlib
import errno
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

BEGAN = time.perf_counter()  # the program, since it imports this file before torch
# Idle threads sleep: where they spin, two runs on one machine slow each other down many times.
# The setting counts before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
LOADED = threading.Event()  # torch, which takes a minute where no cache has it
PATIENCE = 5  # seconds until a line says that it is loaded [U]
# What the transports between processes say when one of them ended
LOST = re.compile(r"gloo|nccl|TCPStore|connection (closed|reset|refused)", re.IGNORECASE)
# Larger ones are no steps of srun: the shell of salloc has 4294967290
LAST_STEP = 0xFFFFFFF0


if not find_spec("torch"):
    print(f"{os.path.basename(sys.argv[0])}: this Python has no torch: install as README.md says, "
          "then `. .venv/bin/activate`", file=sys.stderr)  # fmt: skip
    sys.exit(2)


class Stopped(Exception):
    """The program cannot go on; one line says why. What it did so far is on disk."""


def run_early(name: str, parse: Callable[[Sequence[str] | None], Any]) -> None:
    """Parse the command line before torch is loaded: exits with one line where it is wrong, or at
    Ctrl-C or SIGTERM while it is loaded.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(fail(name, "interrupted", 130)))
    try:
        parse(None)
    except ValueError as error:
        sys.exit(fail(name, error, 2))
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        threading.Thread(target=note_loading, args=(name,), daemon=True).start()


def note_loading(name: str) -> None:
    """A line on stderr where it takes long until `run_program` is called."""
    if not LOADED.wait(PATIENCE):
        print(f"{name}: loads PyTorch, at first this can take a minute", file=sys.stderr)


def run_program(
    name: str, main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> int:
    """Calls main(argv) and turns what it raises into one line on stderr; returns the status."""
    LOADED.set()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is written as \\u043c
            # Into a pipe or a file, too, each line is written at once
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    os.environ.update(task_of_slurm(os.environ))
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # no trace from the very end
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # in the background it is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # where no run saves first
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        return fail(name, error, 2)
    except Stopped as error:
        return fail(name, error, 1)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)
    except RuntimeError as error:
        line = textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...")
        if "out of memory" in line or "can't allocate memory" in line:
            return fail(name, f"{line}: take a smaller --batch-size, --image-size or network", 2)
        if LOST.search(line) and os.environ.get("WORLD_SIZE", "1") != "1":
            kept = "what the main one, rank 0, has saved is kept in last.pth"
            return fail(name, f"another process is gone, and may say why; {kept} ({line})", 1)
        raise


def fail(name: str, reason: Exception | str, status: int) -> int:
    """One line on stderr, from every process that meets it -> the status."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"rank {os.environ['RANK']}: " if several else ""
    if getattr(reason, "errno", 0) == errno.ENOSPC:
        reason = f"{reason}: make room, and give the same command again"
    with contextlib.suppress(OSError):  # nobody reads any more
        print(f"{name}: {rank}{reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if several:  # ends at once: a group of processes that is taken apart waits for the others
        os._exit(status)
    return status


def task_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Which of several processes of srun this is, in torchrun's words; {} where it is none.

    SLURM_STEP_ID decides: srun alone sets it, and the shell of salloc to a number beyond all steps.
    """
    known = {name.removeprefix("SLURM_"): text for name, text in environment.items()}
    step = int(known.get("STEP_ID", LAST_STEP))
    tasks = known.get("STEP_NUM_TASKS") or known.get("NTASKS", "1")
    if step >= LAST_STEP or tasks == "1" or {"RANK", "WORLD_SIZE"} & known.keys():
        return {}
    nodes = known.get("STEP_NODELIST") or known.get("JOB_NODELIST", "localhost")
    host = re.sub(r"\[(\w+).*?\]", r"\1", re.match(r"(\[.*?\]|[^,])+", nodes)[0])  # node[07-09],x
    port = 20_000 + (int(known.get("JOB_ID", 0)) + step) % 10_000  # two jobs may share a machine
    one_gpu = "," not in known.get("CUDA_VISIBLE_DEVICES", ",")  # as with --gpus-per-task=1
    return dict(
        RANK=known["PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK="0" if one_gpu else known["LOCALID"],
        MASTER_ADDR=known.get("MASTER_ADDR", host),
        MASTER_PORT=known.get("MASTER_PORT", str(port)),
    )
