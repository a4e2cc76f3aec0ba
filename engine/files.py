"""Files that are whole or absent, whatever ends the process while it writes one."""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that `path` holds the old content or the new one at any moment.

    write(file) fills a temporary neighbor, which is flushed to the disk and renamed. Raises OSError
    that names `path`, which is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """The temporary files in a folder, and below it, of processes that died while they wrote."""
    for file in folder.rglob(".*.[0-9]*.tmp"):
        file.unlink(missing_ok=True)


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of later steps, whose work was lost, and one that was cut off."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [(line, re.fullmatch(rb'{"step": (\d+), .*}\n', line)) for line in lines]
    kept = [line for line, found in whole if found and int(found[1]) <= step]
    if kept != lines:
        write_atomically(file, lambda out: out.writelines(kept))


def write_json(path: str | Path, contents: Any) -> None:
    """JSON with an indent of one, atomically. Raises OSError."""
    write_lines(path, [json.dumps(contents, indent=1)])


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """One line each, atomically. Raises OSError."""
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def read_lines(file: str | Path) -> list[str]:
    """The lines of a list of names, without spaces at both ends. Raises ValueError, OSError."""
    try:  # "-sig": some editors begin a file with a mark, which is no part of the first name
        return [line.strip() for line in Path(file).read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file with one name per line") from None


def found_in(path: Path) -> str:
    """What is in a folder, or in the nearest one above it, for a person."""
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"found in {folder}: {', '.join(names[:6]) or 'nothing'}{more}"
