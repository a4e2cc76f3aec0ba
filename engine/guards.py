"""What a run shares with the world: signals that ask it to stop, and a folder for it alone."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import TextIO

from engine.log import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STOPS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")  # of which Windows lacks some


class Paused(Exception):
    """A signal to one rank or more has ended a test on all of them."""


class StopSignals:
    """Signals ask a run to end after its batch, of a step or of a test.

    received: the name of the first one, or ""; saves: whether the run then writes a checkpoint.
    """

    def __init__(self, saves: bool):
        self.received, self.before, self.saves = "", {}, " and saves" * saves

    def __enter__(self) -> None:
        numbers = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self.note) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: FrameType | None) -> None:
        """The handler. It answers at once, since a step may take minutes."""
        if self.received == "SIGINT" and number == signal.SIGINT:  # a second Ctrl-C
            os.write(2, b"ended at once: what was learned since the last writing is lost\n")
            os._exit(130)
        if self.received and number != signal.SIGINT:
            return
        self.received = signal.Signals(number).name
        if int(os.environ.get("RANK", 0)) == 0:
            again = "; a second Ctrl-C ends it now" if number == signal.SIGINT else ""
            line = f"{self.received} received: the run ends after this batch{self.saves}{again}\n"
            # print() is not safe in a handler: the run may be in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, line.encode())


def end_with_parent() -> None:
    """In a process that another one started: end at once where that one is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def lock(folder: Path) -> TextIO:
    """Lock a folder for this process, until the returned file is closed. Raises ValueError where
    another process has it; OSError.
    """
    file = open(folder / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115, for the whole run
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            holder = file.read().strip() or "another process"
            advice = "wait for it, or give another folder; if its machine is gone, remove run.lock"
            raise ValueError(f"{folder} is in use by {holder}: {advice}") from None
        say(f"{folder} is on a file system without locks: start no second run in it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
