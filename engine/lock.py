"""One run per output directory.

Slide: none.
Paper: none.
Differs: not in the released code.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "run.lock"


class Lock:
    """A lock on a folder that ends with this process, however it ends.

    It belongs to the process alone, not to those that it starts: a worker that outlives a killed
    run does not hold it. Raises ValueError, with the host and the process, where another run does.
    """

    def __init__(self, folder: Path):
        self.path, self.file = folder / NAME, None
        if fcntl is None:
            return
        while True:
            self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115, held by the run
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                self.file.close()
                raise ValueError(
                    f"--output-dir {folder} is in use by {holder}: wait for that run, or give "
                    "another --output-dir"
                ) from None
            with contextlib.suppress(
                OSError
            ):  # a run that ended meanwhile has removed the file: take a new one
                if os.stat(self.path).st_ino == os.fstat(self.file.fileno()).st_ino:
                    break
            self.file.close()
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Remove the file while the lock still holds, then let go."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None
