"""What can happen to a process: signals, lost neighbors, memory that does not suffice.

Slide: none.
Paper: none.
Differs: in the released code each of these ends the run with a trace.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from engine import files

# Signal -> exit status of the pause that it asks for. Clusters send SIGTERM and SIGUSR1 and expect
# a pause; a person sends SIGINT, and what stands after the command must then not run; SIGHUP means
# that the terminal is gone.
STATUS = {"SIGTERM": 0, "SIGUSR1": 0, "SIGINT": 130, "SIGHUP": 129}


class StopSignals:
    """The signals in STATUS ask a run to end after its step; a second SIGINT ends it at once.

    Used as `with StopSignals() as signals`, after which signals mean what they did before.
    `received` is the first one's name, or "".
    """

    def __init__(self):
        self.received, self.interrupted = "", False

    def __enter__(self) -> StopSignals:
        there = [getattr(signal, name) for name in STATUS if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self.note) for number in there}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The handler. It answers at once, since a step may take minutes."""
        if self.interrupted and number == signal.SIGINT:
            end_now(130)
        self.interrupted = self.interrupted or number == signal.SIGINT
        if not self.received:
            self.received = signal.Signals(number).name
            if int(os.environ.get("RANK", 0)) == 0:
                again = "; a second Ctrl-C ends it now" if self.interrupted else ""
                # print() is not safe in a handler: the run may be in the middle of one.
                line = f"{self.received} received: the run ends after this step and saves{again}"
                try_to_write(2, line + "\n")

    @property
    def status(self) -> int:
        """The exit status of a run that paused: see STATUS."""
        return STATUS.get(self.received, 0)


def try_to_write(descriptor: int, text: str) -> None:
    """Write to a file descriptor; a terminal that is gone is no error."""
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return


# What the libraries below say when another process is gone; their error is a plain RuntimeError.
GONE = re.compile(
    r"gloo|nccl|connection|connect|socket|timed out|broken pipe|TCPStore|DistStore", re.IGNORECASE
)


def lost(error: BaseException) -> str:
    """What is lost, in a few words, if this error says that another process is; else nothing."""
    if not isinstance(error, RuntimeError) or not str(error).strip():
        return ""
    line = re.sub(r"\[\S*/\S*\] *", "", str(error).strip().splitlines()[0])  # no place in C++
    line = line[:120]
    if line.startswith("DataLoader worker"):
        return reader_died(line)
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many and (isinstance(error, dist.DistError) or GONE.search(line)):
        return f"process {os.environ['RANK']} has lost contact with another process ({line})"
    return ""


def out_of_memory(error: BaseException) -> str:
    """What did not fit into the memory of a GPU or of the machine, in a few words; else nothing."""
    full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not full:
        return ""
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return "out of memory" + (f" ({wanted[1]} more were wanted)" if wanted else "")


class ReaderDied(BaseException):
    """A process that reads images is gone. No Exception, since PyTorch answers one by looking for
    the dead in its own way.
    """


class ReaderWatch:
    """Notices the death of a process that reads images, and raises in `waiting` alone.

    PyTorch's own handler of SIGCHLD raises anywhere in the main process, also in the middle of a
    save; and when PyTorch looks for the dead, it takes a lock that one of them may have held, and
    waits for it without end.
    """

    def __init__(self):
        self.others = set(multiprocessing.active_children())
        self.readers: set[Any] | None = None  # processes, known after the first batch
        self.is_waiting = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch. Raises ReaderDied once one is gone."""
        self.is_waiting = True
        try:
            self.raise_if_one_died()
            yield
        finally:
            self.is_waiting = False
            if self.readers is None:
                self.readers = set(multiprocessing.active_children()) - self.others
                if self.readers and hasattr(signal, "SIGCHLD"):
                    self.of_pytorch = signal.signal(signal.SIGCHLD, self.note)

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """The handler."""
        if self.is_waiting:
            self.raise_if_one_died()

    def raise_if_one_died(self) -> None:
        """Raises ReaderDied, which names the process."""
        for reader in self.readers or ():
            # Also where the handler runs in the middle of an `is_alive` that has just buried it.
            if not reader.is_alive() or not files.is_alive(reader.pid):
                raise ReaderDied(f"process {reader.pid} is gone")

    def close(self) -> None:
        """Leave the signal as it was found."""
        if self.readers and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, self.of_pytorch)
            self.readers = set()


def reader_died(line: str) -> str:
    """What is said when a process that reads images has died; line: PyTorch's words."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the death of the next one is no news
    return (
        "a process that reads images has died, often for want of memory: try fewer --workers "
        f"({line})"
    )


def end_now(status: int) -> NoReturn:
    """End this process and its workers, and wait for nobody: other processes may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
