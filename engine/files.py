"""Files that are whole or absent, whatever ends the process in the middle of writing one.

Slide: none.
Paper: none.
Differs: the released code writes its checkpoints in place.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that `path` holds the old content or the new one at any moment, whatever dies
    when.

    write(file) fills a temporary neighbor, which is flushed to the disk and renamed. Raises
    OSError (disk full, folder not writable) with `path` untouched and the neighbor removed. What
    is no file, such as /dev/stdout or a pipe, is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with open(path, "wb") as device:
            write(device)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself must survive a power cut; some file systems cannot open a folder, and need
    # not.
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: str | Path, contents: dict) -> None:
    """JSON with an indent of one, atomically. Raises OSError."""
    text = json.dumps(contents, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """One line each, atomically. Raises OSError."""
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Delete temporary files that dead processes left in the folder; returns their paths."""
    removed = []
    for name in glob.glob(str(Path(glob.escape(str(folder))) / ".*.[0-9]*.tmp")):
        if not is_alive(int(name.split(".")[-2])):
            Path(name).unlink(missing_ok=True)
            removed.append(Path(name))
    return removed


def is_alive(process: int) -> bool:
    """Whether this machine has a process of that number, other than this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
