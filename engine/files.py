"""Files that are whole or absent, whatever ends the process while it writes one."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that `path` holds the old content or the new one at any moment.

    write(file) fills a temporary neighbor, which is flushed to the disk and renamed. Raises OSError
    with `path` untouched. What is no file, such as a pipe, is written to directly.
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


def write_json(path: str | Path, contents: Any) -> None:
    """JSON with an indent of one, atomically. Raises OSError."""
    text = json.dumps(contents, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """One line each, atomically. Raises OSError."""
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of processes that died while they wrote into the folder."""
    for file in folder.glob(".*.[0-9]*.tmp"):
        file.unlink(missing_ok=True)
